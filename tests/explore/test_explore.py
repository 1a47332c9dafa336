"""`ocvtp explore` as a user calls it, held to `show` and `answer`."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ocvtp import build_pruner
from ocvtp.cli import main
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.towers import TowerSubject
from ocvtp.explore import views
from ocvtp.explore.kept import on_tower
from ocvtp.explore.server import PageServer
from ocvtp.explore.views import ModelView
from ocvtp.hosts.loading import load_model
from ocvtp.images import open_image

MODEL = ["--model", "random:tiny-llava"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    for name, size in (("b.png", (90, 140, 3)), ("a.jpg", (60, 60, 3))):
        Image.fromarray(draws.integers(0, 255, size, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def explored(capsys, tmp_path, *words):
    """The facts in a page, and what was printed."""
    page = tmp_path / "deep" / "page.html"
    assert main(["explore", *words, "--output", str(page), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["output"] == str(page)
    assert printed["bytes"] == page.stat().st_size
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1]), printed


def kept(stage):
    rows, columns = np.array(stage["grids"]).T
    bits = np.unpackbits(np.frombuffer(base64.b64decode(stage["kept"]), np.uint8))
    return bits[: int((rows * columns).sum())].nonzero()[0].tolist()


def looks_of(facts, image, prompt=0):
    """By pruner and budget, the stages."""
    image = facts["images"][image]
    return {
        (facts["pruners"][one["pruner"]]["label"], one["budget"]): image["looks"][run["look"]]
        for one, run in zip(facts["conditions"], image["runs"][prompt], strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("times", [[], ["--no-times"]])
def test_a_page_says_what_show_and_answer_say(capsys, photos, tmp_path, monkeypatch, times):
    fastv = "fastv:stages=[[1,K]]"
    words = [*MODEL, "--images", str(photos), "--pruners", "fopru", fastv]
    words += ["--num-keep", "20", "7", "--prompt", "What?", "And this?", "--max-new-tokens", "3"]
    facts, printed = explored(capsys, tmp_path, *words, *times)
    assert (printed["images"], printed["of"], printed["url"]) == (2, 2, None)
    assert [image["name"] for image in facts["images"]] == ["a.jpg", "b.png"]
    assert facts["prompts"] == ["What?", "And this?"]
    assert facts["budgets"] == ["7", "20"]
    assert [one["label"] for one in facts["pruners"]] == ["unpruned", "fopru", fastv]
    assert [tuple(one.values()) for one in facts["conditions"]] == [
        (0, None), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    drawn = []
    monkeypatch.setattr(
        "ocvtp.commands.show.figure", lambda image, panels, **how: drawn.extend(panels) or Figure()
    )
    given = [*MODEL, "--image", str(photos / "b.png"), "--num-keep", "7", "--prompt", "And this?"]
    shown = ["show", *given, "--pruner", "fopru", fastv, "--output", str(tmp_path / "o.png")]
    assert main(shown) == 0
    looks = looks_of(facts, image=1, prompt=1)
    assert kept(looks["unpruned", None][0]) == list(range(144))
    assert len(kept(looks["fopru", 1][0])) == 20
    for panel, label in zip(drawn, ("fopru", fastv), strict=True):
        (stage,) = looks[label, 0]
        assert stage["grids"] == [list(panel.grid_hw)]
        assert kept(stage) == panel.keep.tolist()
        assert label.partition(":")[0] + stage["place"] == panel.title
    capsys.readouterr()
    answers = [run["answer"] for run in facts["images"][1]["runs"][1]]
    for number, pruner in ((0, "none"), (1, "fopru"), (3, fastv)):
        asked = ["answer", *given, "--pruner", pruner, "--max-new-tokens", "3", "--json"]
        assert main(asked) == 0
        assert json.loads(capsys.readouterr().out)["answer"] == answers[number]
    for image in facts["images"]:
        for run in (run for runs in image["runs"] for run in runs):
            first, *parts = run["times"].values() or (0.0,)
            assert (first > 0) == (not times)
            assert sum(parts) == pytest.approx(first, rel=1e-2)


def test_a_page_of_a_tower_without_a_language_model(capsys, photos, tmp_path):
    words = ["--tower", "random:tiny", "--images", str(photos), "--max-images", "1"]
    words += ["--pruners", "fps", "fastv", "divprune", "--keep-ratio", "0.25", "--skip-unfit"]
    facts, printed = explored(capsys, tmp_path, *words)
    assert (facts["kind"], facts["prompts"], facts["budgets"]) == ("tower", [], ["25%"])
    assert (printed["images"], printed["of"]) == (1, 2)
    assert [one["label"] for one in facts["pruners"]] == ["unpruned", "fps", "divprune"]
    assert (
        facts["pruners"][2]["note"] == "projected tokens: the tower's own, as there is no projector"
    )
    (left,) = printed["unfit"]
    assert left["name"] == "fastv @ 25%"
    assert "on a tower alone those of stage 'llm_input' are judged" in left["why"]
    total = np.prod(looks_of(facts, 0)["unpruned", None][0]["grids"])
    assert len(kept(looks_of(facts, 0)["fps", 0][0])) == total // 4
    for run in facts["images"][0]["runs"][0]:
        assert run["answer"] is None
        assert list(run["times"]) == ["choosing"]
        assert run["times"]["choosing"] > 0


@torch.no_grad()
def test_what_is_merged_into_what(photos):
    """Against the rows of weights, token by token."""
    tower, picture = TowerSubject("random:tiny"), open_image(photos / "b.png")
    pruners = [build_pruner(name, num_keep=9) for name in ("visionzip", "prumerge", "fps")]
    shared = tower.sharing(pruners)
    looked = on_tower(tower, pruners, picture, shared)
    for pruner in pruners[:2]:
        (stage,) = looked.stages[id(pruner)]
        tokens = shared.tokens(tower.pictures([picture]), pruner.tower_needs)
        selection = pruner.select(tokens)
        anchors = selection.keep_indices if selection.anchors is None else selection.anchors
        rows = {int(token): row for row, token in enumerate(anchors[0])}
        for token in range(tokens.num_tokens):
            weights, target = selection.merge[0, :, 1 + token].abs(), int(stage.merged[token])
            if token in rows:
                assert target == token
            elif weights.max() == 0:
                assert target == -1
            else:
                assert weights[rows[target]] == weights.max()
        assert any(stage.merged[n] not in (-1, n) for n in range(tokens.num_tokens))
    assert looked.stages[id(pruners[2])][0].merged is None


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--images", "empty"], "--images empty is a folder without images; pass another one."),
        (["--images", "gone.png"], "image gone.png cannot be read"),
        (["--pruners", "foprou"], "'foprou'"),
        (["--num-keep", "0"], "--num-keep 0; pass at least 1."),
        (["--max-images", "0"], "--max-images 0; pass at least 1."),
        (["--output", "empty"], "--output empty is a folder; pass the name of a file."),
        (["--prompt", "What?"], "--prompt is for pruners that read the prompt"),
        (["--serve", "70000"], "--serve 70000; pass a port up to 65535"),
        (
            ["--num-keep", "4", "1000"],
            "; leave them out, or pass --skip-unfit for a page that says",
        ),
        (["--num-keep", "1000"], "random:tiny; nothing is left to show without them: pass others"),
        (["--num-keep", "1000", "--skip-unfit"], "--num-keep 1000 exceeds the"),
    ],
)
def test_wrong_input_is_one_error(capsys, photos, tmp_path, monkeypatch, words, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    base = {"--images": [str(photos)], "--pruners": ["fps"], "--num-keep": ["4"]}
    base |= {"--output": ["page.html"], "--tower": ["random:tiny"]}
    flag, *values = words
    given = [word for name, own in {**base, flag: values}.items() for word in (name, *own)]
    assert main(["explore", *given]) == 2
    error = capsys.readouterr().err
    assert error.count("ocvtp: error: ") == 1
    assert problem in error
    assert not (tmp_path / "page.html").exists()


def test_a_prompt_beyond_the_context_is_refused_before_anything_is_asked(
    capsys, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(ModelView, "attempt", lambda *_: pytest.fail("something was asked"))
    longest, page = "why " * 600, tmp_path / "page.html"
    pruned = [*MODEL, "--num-keep", "4", "--prompt"]
    words = [*pruned, "What?", longest, "--images", str(photos), "--pruners", "fps"]
    assert main(["explore", *words, "--output", str(page)]) == 2
    told = capsys.readouterr().err
    assert (
        "(144 of them of images) and an answer of 32 does not fit into the 2048 positions" in told
    )
    assert told.endswith("shorten the prompt, or pass a smaller --max-new-tokens.\n")
    assert not page.exists()
    one = ["--pruner", "fps", "--image", str(photos / "a.jpg")]
    for command, more in (("answer", []), ("show", ["--output", str(tmp_path / "kept.png")])):
        assert main([command, *pruned, longest, *one, *more]) == 2
        assert "(besides 144 of images)" in capsys.readouterr().err


def test_every_image_is_opened_once_to_be_checked_and_once_to_be_shown(
    capsys, photos, tmp_path, monkeypatch
):
    opened = []

    def counted(path):
        opened.append(path.name)
        return open_image(path)

    for part in ("commands.explore", "explore.run"):
        monkeypatch.setattr(f"ocvtp.{part}.open_image", counted)
    words = [*MODEL, "--images", str(photos), "--pruners", "fps", "--num-keep", "4"]
    explored(capsys, tmp_path, *words, "--prompt", "What?", "--max-new-tokens", "2")
    assert sorted(opened) == ["a.jpg"] * 3 + ["b.png"] * 2  # the first is tried out too


def test_prompts_are_checked_for_every_size_where_sizes_matter(monkeypatch):
    asked = []
    monkeypatch.setattr(views, "refuse_beyond_context", lambda host, ids, new: asked.append(ids))
    sizes = [(280, 140), (84, 140), (280, 140)]
    for name, times in (("random:tiny-llava", 1), ("random:tiny-qwen2.5-vl", 2)):
        asked.clear()
        model, processor = load_model(name)
        view = ModelView(Subject(model, processor, name), ["What?"])
        view.check(sizes)
        assert len({ids.shape[1] for ids in asked}) == len(asked) == times


def test_a_page_is_served_until_ctrl_c(capsys, photos, tmp_path, monkeypatch):
    served = []

    def serve_forever(server):
        served.append((server.url, server.page.decode(), server.policy))
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", serve_forever)
    page = tmp_path / "page.html"
    words = ["--tower", "random:tiny", "--images", str(photos / "a.jpg"), "--pruners", "fps"]
    assert main(["explore", *words, "--num-keep", "4", "--output", str(page), "--serve"]) == 0
    ((url, text, policy),) = served
    assert f"serving it on {url} to this machine alone" in capsys.readouterr().out
    assert text == page.read_text(encoding="utf-8")
    assert policy.startswith("default-src 'none'; ")
