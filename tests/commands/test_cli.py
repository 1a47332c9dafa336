"""The commands, as a user calls them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import ocvtp
from ocvtp import Needs, Pruner, Selection, VisualTokens
from ocvtp.cli import main
from ocvtp.commands import output
from ocvtp.data.scenes import write_scenes
from ocvtp.hosts.loading import load_model
from ocvtp.images import most_pixels
from ocvtp.pruners import registry
from ocvtp.slots import OCPruner, OCPrunerConfig

MODEL = ["--model", "random:tiny-llava"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact")
    config = OCPrunerConfig(
        feature_dim=64, hidden_dim=32, slot_dim=16, ffn_dim=32, grid_hw=(12, 12), layer=3
    )
    OCPruner(config).save_pretrained(folder)
    return str(folder)


def test_list(capsys):
    assert main(["list"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ocvtp.list_pruners())
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["pruners"]
    assert [row["name"] for row in rows] == ocvtp.list_pruners()
    assert all(row["stage"] and row["needs"] and row["status"] for row in rows)


def test_answer_counts_tokens_before_and_after(capsys, photo):
    words = ["answer", *MODEL, "--pruner", "fastervlm", "--num-keep", "7", "--image", photo]
    words += ["--prompt", "What is it?", "--max-new-tokens", "5"]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["visual_tokens"] == [144]
    assert facts["visual_tokens_kept"] == [7]
    assert facts["prompt_tokens"] - facts["prompt_tokens_kept"] == 144 - 7
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "fastervlm: 7 of 144 visual tokens" in text
    assert main([*words[:4], "none", *words[7:], "--json"]) == 0
    unpruned = json.loads(capsys.readouterr().out)
    assert unpruned["prompt_tokens"] == unpruned["prompt_tokens_kept"]


@pytest.mark.slow
def test_photographs_are_seen_upright_and_deep_greys_scaled(capsys, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (60, 96)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.rot90(levels).astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png", exif=exif)
    Image.fromarray(levels).save(tmp_path / "plain.png")
    Image.fromarray(np.rot90(levels)).save(tmp_path / "sideways.png")
    said, drawn = {}, {}
    for name in ("plain", "deep", "sideways"):
        words = [*MODEL, "--image", str(tmp_path / f"{name}.png"), "--json"]
        more = ["--num-keep", "140", "--prompt", "What?", "--max-new-tokens", "12"]
        assert main(["answer", *words, "--pruner", "fastervlm", *more]) == 0
        said[name] = json.loads(capsys.readouterr().out)["answer"]
        assert main(["show", *words, "--pruner", "none", "--output", str(tmp_path / "o.png")]) == 0
        capsys.readouterr()
        drawn[name] = (tmp_path / "o.png").read_bytes()
    assert said["deep"] == said["plain"] != said["sideways"]
    assert drawn["deep"] == drawn["plain"] != drawn["sideways"]


@pytest.mark.parametrize("budget", [["--keep-ratio", "0.25"], ["--max-keep", "36"]])
def test_answer_with_several_images_and_a_ratio_or_a_cap(capsys, photo, budget):
    words = ["answer", *MODEL, "--pruner", "uniform", *budget, "--json"]
    words += ["--image", photo, photo, "--prompt", "Same?", "--max-new-tokens", "2"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens_kept"] == [36, 36]


def test_answer_with_the_learned_pruner(capsys, photo, artifact):
    words = ["answer", *MODEL, "--pruner", "ocvtp", "--checkpoint", artifact, "--num-keep", "9"]
    words += ["--image", photo, "--prompt", "Hm?", "--max-new-tokens", "2", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens_kept"] == [9]


@pytest.mark.slow
def test_show_draws_every_pruner(capsys, photo, artifact, tmp_path):
    out = tmp_path / "deep" / "picture.png"
    words = ["show", *MODEL, "--pruner", "ocvtp", "fastervlm:block=-3", "random:seed=4"]
    words += ["--checkpoint", artifact, "--num-keep", "16", "--image", photo]
    assert main([*words, "--output", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"] == {"ocvtp": 16, "fastervlm": 16, "random": 16}
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert min(picture.shape[:2]) > 200
    assert picture.std() > 10


def test_show_several_images_in_a_model_and_on_its_tower_alone(
    capsys, photo, artifact, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        "ocvtp.commands.show.figure_of_images",
        lambda pictures, **how: drawn.append(pictures) or Figure(),
    )
    other = tmp_path / "other.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 60, 3), np.uint8)).save(other)
    load_model("random:tiny-llava")[0].save_pretrained(tmp_path / "vlm")
    load_model("random:tiny-llava")[1].save_pretrained(tmp_path / "vlm")
    words = ["--pruner", "ocvtp", "fastervlm", "fps", "--checkpoint", artifact, "--num-keep", "16"]
    words += ["--image", photo, str(other), "--output", str(tmp_path / "picture.png"), "--json"]
    facts = []
    for flag in ("--model", "--tower"):
        assert main(["show", flag, str(tmp_path / "vlm"), *words]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    assert facts[0] == facts[1]
    kept = {"ocvtp": 16, "fastervlm": 16, "fps": 16}
    assert [(one["image"], one["kept"]) for one in facts[1]["images"]] == [
        (photo, kept),
        (str(other), kept),
    ]
    assert facts[1]["visual_tokens"] == 144
    for (seen, panels), (alone, own) in zip(*drawn, strict=True):
        np.testing.assert_array_equal(seen, alone)
        for panel, mine in zip(panels, own, strict=True):
            assert (panel.title, panel.grid_hw) == (mine.title, mine.grid_hw)
            assert panel.keep.equal(mine.keep)
            assert (panel.attention is None) == (mine.attention is None)
            if panel.attention is not None:
                assert panel.attention.shape == (16, 144)
                torch.testing.assert_close(panel.attention, mine.attention)


@pytest.mark.slow
def test_show_on_a_tower_alone(capsys, photo, tmp_path):
    out = tmp_path / "picture.png"
    words = ["show", "--tower", "random:tiny", "--image", photo, "--output", str(out)]
    asked = [*words, "--num-keep", "9", "--pruner"]
    assert main([*asked, "fopru", "fastervlm", "uniform", "--json"]) == 0  # of two encodings
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"] == {"fopru": 9, "fastervlm": 9, "uniform": 9}
    assert "notes" not in facts
    assert np.asarray(Image.open(out).convert("RGB")).std() > 10
    note = "projected tokens: the tower's own, as there is no projector"
    assert main([*asked, "divprune", "todre", "uniform", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"] == {"divprune": 9, "todre": 9, "uniform": 9}
    assert facts["notes"] == {"divprune": note, "todre": note}
    assert main([*asked, "random", "fastervlm:block=-3", "random:seed=4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)  # two of one name are told apart
    assert facts["kept"] == {"random:seed=0": 9, "fastervlm": 9, "random:seed=4": 9}
    assert main([*asked, "divprune"]) == 0
    assert capsys.readouterr().out.startswith(f"divprune: {note}\nwrote ")
    for pruner, more, message in (
        ("fastv", [], "pruner 'fastv' acts at stage 'llm_layers'; on a tower alone"),
        ("greedyprune", [], "pruner 'greedyprune' reads the prompt, which a tower alone"),
        ("uniform", ["--prompt", "?"], "--prompt is for pruners that read the prompt, and --tower"),
        ("uniform", ["--img-size", "80"], "--img-size 80, but the tower 'random:tiny' sees 96 "),
        ("uniform", ["--feature-layer", "8"], "hidden_states[8] does not exist in this tower"),
    ):
        assert main([*asked, pruner, *more]) == 2
        assert message in the_error(capsys)


@pytest.mark.parametrize(("source", "count"), [(MODEL, 1), (["--tower", "random:tiny"], 2)])
@pytest.mark.slow
def test_show_draws_nothing_of_images_that_are_hidden(capsys, photo, tmp_path, source, count):
    """Two photographs with the same tokens kept are the same figure; shown, they differ."""
    other = tmp_path / "other.png"
    Image.fromarray(np.random.default_rng(7).integers(0, 255, (80, 80, 3), np.uint8)).save(other)
    out = tmp_path / "picture.png"
    words = ["show", *source, "--pruner", "uniform", "--num-keep", "9"]
    words += ["--output", str(out), "--image"]
    drawn = {}
    for hide in ([], ["--hide-image"]):
        for name in (photo, str(other)):
            assert main([*words, *[name] * count, *hide]) == 0
            drawn[name, bool(hide)] = np.asarray(Image.open(out).convert("RGB"))
    assert np.array_equal(drawn[photo, True], drawn[str(other), True])
    assert not np.array_equal(drawn[photo, False], drawn[str(other), False])
    assert drawn[photo, True].std() > 10
    capsys.readouterr()


@pytest.mark.slow
def test_a_model_that_cuts_images_into_tiles(capsys, photo, artifact, tmp_path):
    words = ["--model", "random:tiny-llava-next", "--image", photo, "--num-keep", "40", "--json"]
    asked = ["--pruner", "visionzip", "--prompt", "What is it?", "--max-new-tokens", "2"]
    assert main(["answer", *words, *asked]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["visual_tokens_kept"] == [40]
    assert facts["prompt_tokens_kept"] < facts["prompt_tokens"] - 250
    asked = [*asked, "--budget", "per_tile", "--separators", "none"]
    assert main(["answer", *words, *asked, "--num-keep", "5"]) == 0
    per_tile = json.loads(capsys.readouterr().out)
    assert set(per_tile["visual_tokens_kept"]) == {5}
    text = facts["prompt_tokens_kept"] - 40  # and a newline for each row that kept a token
    assert per_tile["prompt_tokens_kept"] <= text + 5 * len(per_tile["visual_tokens_kept"])
    out = tmp_path / "picture.png"
    words += ["--pruner", "ocvtp", "uniform", "--checkpoint", artifact, "--output", str(out)]
    assert main(["show", *words]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"] == {"ocvtp": 40, "uniform": 40}
    assert Image.open(out).width > 1000  # two grids of each, and slots
    assert main(["show", *words, "--budget", "per_tile", "--num-keep", "5"]) == 0
    each = json.loads(capsys.readouterr().out)
    assert each["visual_tokens"] == facts["visual_tokens"]
    tiles = len(per_tile["visual_tokens_kept"])
    assert each["kept"] == {"ocvtp": 5 * tiles, "uniform": 5 * tiles}


@dataclass(kw_only=True, eq=False)
class Reading(Pruner):
    """Keeps what is closest to the prompt, and remembers what it was shown."""

    wants: Needs = field(default_factory=lambda: Needs(text=True, clip=True))
    seen: ClassVar[list[VisualTokens]] = []

    name = "reading"
    status = "control"

    @property
    def needs(self):
        return self.wants

    def _select(self, tokens, num_keep):
        self.seen.append(tokens)
        scores = (tokens.clip_visual @ tokens.clip_text[:, 0, :, None]).squeeze(2)
        return Selection(scores.topk(num_keep).indices.sort().values)


@pytest.fixture
def reading(monkeypatch):
    monkeypatch.setitem(registry._REGISTRY, "reading", Reading)
    Reading.seen.clear()
    return Reading.seen


def spoken(tokens):
    """The words that a pruner was shown of the random model's prompt."""
    from ocvtp.hosts.loading import load_model

    model, processor = load_model("random:tiny-llava")
    every = model.get_input_embeddings().weight.detach()
    ids = [int((every == row).all(dim=1).nonzero()[0]) for row in tokens.text[0]]
    return processor.tokenizer.decode(ids)


def test_answer_with_a_pruner_that_reads_the_prompt(capsys, photo, reading):
    words = ["answer", *MODEL, "--pruner", "reading", "--num-keep", "7", "--image", photo, photo]
    words += ["--prompt", "What is it?", "--max-new-tokens", "2", "--text-tower", "random:tiny"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens_kept"] == [7, 7]
    assert spoken(reading[0]) == "What is it?"
    assert reading[0].clip_text.shape == (2, 1, 64)


@pytest.mark.slow
def test_show_with_pruners_that_read_the_prompt(capsys, photo, reading, tmp_path):
    out = tmp_path / "picture.png"
    words = ["show", *MODEL, "--pruner", "reading", "uniform", "--num-keep", "16", "--image", photo]
    words += ["--output", str(out), "--text-tower", "random:tiny"]
    assert main([*words, "--prompt", "Where?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == {"reading": 16, "uniform": 16}
    assert spoken(reading[0]) == "Where?"
    out.unlink()
    assert main(words) == 2
    assert "reading reads the prompt; pass --prompt" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_show_with_pruners_that_disagree(capsys, photo, tmp_path, monkeypatch):
    """They mean different things by received attention, so each is shown its own."""
    from ocvtp.hosts.families.llava import LlavaHost

    class Received(Pruner):
        status = "control"
        name = "all_queries"
        patches = False

        @property
        def needs(self):
            return Needs(attention=((-2, "received"),), patch_queries=self.patches)

        def _select(self, tokens, num_keep):
            seen.append(tokens.attention[-2, "received"])
            return Selection(seen[-1].topk(num_keep).indices.sort().values)

    class Patches(Received):
        name = "patch_queries"
        patches = True

    encode, seen, calls = LlavaHost.encode, [], []
    monkeypatch.setattr(LlavaHost, "encode", lambda *a: calls.append(1) or encode(*a))
    for cls in (Received, Patches):
        monkeypatch.setitem(registry._REGISTRY, cls.name, cls)
    words = [
        "show",
        *MODEL,
        "--num-keep",
        "9",
        "--image",
        photo,
        "--output",
        str(tmp_path / "a.png"),
    ]
    words += ["--pruner", "all_queries", "patch_queries", "random", "fastervlm", "--json"]
    assert main(words) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert list(kept) == ["all_queries", "patch_queries", "random", "fastervlm"]
    assert len(calls) == 2
    assert (seen[0] - seen[1]).abs().max() > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["answer", *MODEL, "--pruner", "fastvlm", "--num-keep", "4"], "did you mean 'fastervlm'"),
        (["answer", *MODEL, "--pruner", "uniform", "--num-keep", "999"], "at most 144"),
        (
            ["answer", *MODEL, "--pruner", "uniform:num_keep=9", "--max-keep", "4"],
            "--max-keep 4 would not count: uniform:num_keep=9 says how many tokens stay",
        ),
        (
            ["answer", *MODEL, "--pruner", "uniform", "--num-keep", "4", "--checkpoint", "here"],
            "--checkpoint here would not count: uniform takes no checkpoint; leave it out, or",
        ),
        (
            ["answer", *MODEL, "--pruner", "ocvtp:checkpoint=a", "--num-keep", "4"]
            + ["--checkpoint", "b"],
            "--checkpoint b would not count: ocvtp:checkpoint=a says its own; leave it out.",
        ),
        (["answer", *MODEL, "--pruner", "uniform"], "pass exactly one"),
        (["answer", *MODEL, "--pruner", "uniform:seed", "--num-keep", "4"], "KEY=VALUE"),
        (
            ["answer", *MODEL, "--pruner", "ocvtp", "--num-keep", "4"],
            "pass --checkpoint DIR_OR_HUB_ID",
        ),
        (["answer", *MODEL, "--pruner", "uniform"], "got no --num-keep and no --keep-ratio; pass"),
        (["answer", *MODEL, "--pruner", "trim", "--num-keep", "4"], "; pass --text-tower, the hub"),
        (
            ["answer", *MODEL, "--pruner", "fastv:stages=[[9,4]]"],
            "has 3; pass NAME:stages=[[layer,K],...] with layers 1 to 2.",
        ),
        (
            ["answer", *MODEL, "--pruner", "fastv:stages=[[2,4],[1,3]]"],
            "stages=[[2,4],[1,3]]; pass (layer, K) pairs with ascending layers and K above 0, e.g."
            " stages=[[2,128],[16,64]]:",
        ),
        (["answer", "--model", "random:x", "--pruner", "none"], "random:tiny-llava"),
        (["answer", "--model", "/no/such", "--pruner", "none"], "cannot be loaded"),
    ],
)
def test_wrong_input_is_one_line_on_stderr(capsys, photo, words, message):
    assert main([*words, "--image", photo, "--prompt", "?"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("ocvtp: error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_what_is_given_by_its_place_is_no_flag_of_a_message(monkeypatch, capsys):
    def run(arguments):
        raise ValueError(f"size={arguments.size} of source={arguments.source!r} is odd.")

    monkeypatch.setattr("ocvtp.commands.resize.run", run)
    assert main(["resize", "photos", "small", "--size", "3"]) == 2
    assert capsys.readouterr().err == "ocvtp: error: --size 3 of source='photos' is odd.\n"


EVALUATE = ["evaluate", *MODEL, "--task", "scenes", "--pruners", "fopru", "--num-keep", "9"]
BENCH = ["bench", *MODEL, "--pruners", "fopru", "--num-keep", "9"]
FLOPS = ["flops", "--model", "llava-1.5-7b", "--num-keep", "64"]
ANSWER = ["answer", *MODEL, "--pruner", "fopru", "--num-keep", "4", "--prompt", "?"]
SHOW = ["show", *MODEL, "--pruner", "fopru", "--num-keep", "4", "--output", "picture.png"]


def the_error(capsys):
    """The one line on stderr that is an error, without its beginning."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if "error" in line.lower()]
    assert line.startswith("ocvtp: error: ")
    return line.removeprefix("ocvtp: error: ")


@pytest.mark.parametrize("words", [EVALUATE, BENCH, ANSWER, SHOW], ids=lambda words: words[0])
@pytest.mark.parametrize("device", ["cuda:77", "nowhere"])
def test_a_device_that_is_not_there(capsys, photo, tmp_path, monkeypatch, words, device):
    monkeypatch.chdir(tmp_path)
    image = ["--image", photo] if words[0] in ("answer", "show") else []
    assert main([*words, *image, "--device", device]) == 2
    error = the_error(capsys)
    assert error.startswith(f"--device {device} cannot be used (")
    assert error.endswith("; pass cpu.") or "cpu or cuda:0" in error
    assert not any(tmp_path.iterdir())


def test_a_dtype_that_is_none(capsys, photo):
    assert main([*ANSWER, "--image", photo, "--dtype", "int8"]) == 2
    assert the_error(capsys) == "--dtype int8; pass auto, float32, bfloat16 or float16."


@pytest.mark.parametrize(
    "words",
    [EVALUATE, BENCH, FLOPS, SHOW, ["lmms-task", "--task", "pope"], ["export", "--official", "x"]],
    ids=lambda words: words[0],
)
def test_an_output_that_is_or_lies_in_a_file(capsys, photo, tmp_path, words):
    (tmp_path / "file").write_text("mine")
    image = ["--image", photo] if words[0] == "show" else []
    name = "deep/in.png" if words[0] == "show" else "deep"
    places = [f"file/{name}"] if words[0] == "show" else ["file", f"file/{name}"]
    for place in places:
        assert main([*words, *image, "--output", str(tmp_path / place)]) == 2
        assert f"{tmp_path / 'file'} is a file; pass a folder" in the_error(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_that_may_not_be_written_to(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main([*EVALUATE, "--output", str(tmp_path / "new" / "deep")]) == 2
    assert f"{tmp_path} may not be written to; pass another place" in the_error(capsys)
    assert not any(tmp_path.iterdir())


def test_a_picture_that_is_a_folder(capsys, photo, tmp_path):
    assert main([*SHOW[:-1], str(tmp_path), "--image", photo]) == 2
    assert "is a folder; pass the name of a file" in the_error(capsys)


def test_what_the_system_refuses_is_one_line(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "results.json"))

    monkeypatch.setattr("ocvtp.random_models.full_size.config_of", full)
    assert main(FLOPS) == 2
    assert the_error(capsys).startswith(f"{tmp_path / 'results.json'}: No space left on device")


@pytest.mark.parametrize("wrapped", [None, RuntimeError, ValueError])
@pytest.mark.parametrize(("words", "continues"), [(EVALUATE, True), (BENCH, True), (FLOPS, False)])
def test_a_stopped_command_says_how_it_goes_on(
    capsys, tmp_path, monkeypatch, words, continues, wrapped
):
    """Also where a library made another error of it."""

    def stop(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            if wrapped is None:
                raise
            raise wrapped("Error calling __set_name__ on 'Field'") from error

    monkeypatch.setattr("ocvtp.hosts.loading.byte_tokenizer", stop)
    monkeypatch.setattr("ocvtp.random_models.full_size.config_of", stop)
    assert main([*words, "--output", str(tmp_path)]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ocvtp: stopped")
    assert ("the same command continues" in line) == continues


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("ocvtp.random_models.full_size.config_of", fail)
    with pytest.raises(ZeroDivisionError):
        main(FLOPS)


@pytest.mark.parametrize(
    "command", [["--help"], pytest.param(["list", "--json"], marks=pytest.mark.slow)], ids=" ".join
)
def test_a_reader_that_goes_away_is_no_error(command):
    words = [sys.executable, "-m", "ocvtp.cli", *command]
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    found = subprocess.run(words, stdout=reader.stdin, stderr=subprocess.PIPE, check=False)
    reader.stdin.close()
    assert b"Traceback" not in found.stderr
    assert b"BrokenPipe" not in found.stderr


def test_an_unreadable_image_is_named(capsys, tmp_path):
    (tmp_path / "photo.jpg").write_text("no image")
    words = ["answer", *MODEL, "--pruner", "none", "--prompt", "?", "--image"]
    assert main([*words, str(tmp_path / "photo.jpg")]) == 2
    assert "photo.jpg" in capsys.readouterr().err


def test_resize(capsys, tmp_path):
    write_scenes(tmp_path / "in", num_train=3, num_val=1, size=96, seed=0)
    source, output = str(tmp_path / "in" / "train2017"), tmp_path / "out"
    assert main(["resize", source, str(output), "--size", "48", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 3
    sizes = {Image.open(p).size for p in output.glob("*.jpg")}
    assert sizes == {(48, 48)}


def test_files_of_pruners_come_before_the_command(capsys, tmp_path):
    file = tmp_path / "kept_by_chance.py"
    file.write_text(
        "from ocvtp.pruners.methods.random import Random\n"
        "from ocvtp.pruners.registry import register\n"
        "register('by_chance')(type('ByChance', (Random,), {'__doc__': Random.__doc__}))\n"
    )
    try:
        for flag in (["--import", str(file)], [f"--import={file}"], [f"--import={file}", "--"]):
            assert main([*flag, "list"]) == 0
            assert "by_chance" in capsys.readouterr().out
    finally:
        registry._REGISTRY.pop("by_chance", None)
        sys.modules.pop("kept_by_chance", None)
    for words in (["--import"], ["--imp", str(file), "list"], []):
        with pytest.raises(SystemExit):
            main(words)
        assert "ocvtp: error: " in capsys.readouterr().err


def test_the_command_of_a_report_has_what_came_before_it(monkeypatch):
    typed = []
    monkeypatch.setattr(
        "ocvtp.commands.merge.run", lambda given: typed.append(output.command(given)) or 0
    )
    words = ["--max-pixels", str(most_pixels()), "merge", "a", "b c", "--output", "d"]
    assert main(words) == 0
    assert typed == [shlex.join(["ocvtp", *words])]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("train", "export", "resize", "list", "answer", "show"):
        assert command in text


def test_what_stages_of_the_tower_and_of_the_language_model_keep(
    capsys, photo, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        "ocvtp.commands.show.figure", lambda image, panels, **how: drawn.extend(panels) or Figure()
    )
    out = tmp_path / "picture.png"
    words = ["show", *MODEL, "--image", photo, "--num-keep", "9", "--output", str(out), "--json"]
    pruners = ["tome", "fastv:stages=[[1,20]]", "pyramiddrop:stages=[[1,30],[2,4]]", "uniform"]
    assert main([*words, "--pruner", *pruners]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"] == {"tome": 9, "fastv": 20, "pyramiddrop": 4, "uniform": 9}
    assert facts["visual_tokens"] == 144
    assert [(panel.title, len(panel.keep)) for panel in drawn] == [
        ("tome", 9),
        ("fastv, layer 1", 20),
        ("pyramiddrop, layer 1", 30),
        ("pyramiddrop, layer 2", 4),
        ("uniform", 9),
    ]
    assert set(drawn[3].keep.tolist()) <= set(drawn[2].keep.tolist())


def test_what_the_tower_left_is_told_in_an_answer(capsys, photo):
    words = ["answer", *MODEL, "--image", photo, "--prompt", "What?", "--max-new-tokens", "2"]
    words += ["--pruner", "tome", "--num-keep", "30"]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    names = ("visual_tokens", "visual_tokens_encoded", "visual_tokens_kept")
    assert [facts[name] for name in names] == [[144], [30], [30]]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "30 of 144 visual tokens per image; 30 left by the tower; prompt" in said


def test_stages_are_told_in_an_answer(capsys, photo):
    words = ["answer", *MODEL, "--image", photo, "--prompt", "What?", "--max-new-tokens", "2"]
    words += ["--pruner", "fastv:stages=[[1,20]],layer=2"]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["visual_tokens_kept"] == [144]
    assert facts["layers"] == [{"layer": 1, "visual_tokens_kept": [20]}]
    assert main(words) == 0
    assert "144 of 144 visual tokens per image; 20 from layer 1 on;" in capsys.readouterr().out
    assert main([*words[:-2], "--pruner", "fastv:stages=[[1"]) == 2
    assert "'[[1' is no value; write numbers, words or lists" in capsys.readouterr().err


def test_a_flag_is_written_out(capsys):
    """`--keep 16` would be a share, or a count, of whichever flag begins so."""
    with pytest.raises(SystemExit):
        main(["flops", "--model", "llava-1.5-7b", "--num-ke", "64"])
    assert "--num-ke" in capsys.readouterr().err
