"""What needs no lmms-eval: arguments, prompts, written tasks and their scoring."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ocvtp.cli import main
from ocvtp.evaluation.lmms.export import export_task, shipped_tasks
from ocvtp.evaluation.lmms.prompts import ask
from ocvtp.evaluation.lmms.settings import MAX_NEW_TOKENS, GenerationArgs, ModelArgs
from ocvtp.evaluation.tasks.base import Item
from ocvtp.evaluation.tasks.pope import pope_ratios
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.hosts.loading import load_model

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "ocvtp" / "evaluation" / "lmms" / "tasks"


@pytest.fixture(scope="module")
def scoring():
    """The functions as lmms-eval finds them: by the path of the file beside the YAML."""
    spec = importlib.util.spec_from_file_location("scoring", SHIPPED / "scoring.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def processor():
    return load_model("random:tiny-llava")[1]


def read(**given):
    return ModelArgs.read({"pretrained": "M"} | given)


def test_arguments_as_lmms_eval_parses_them():
    args = read(pruner='"fopru:strategy=row,block=-1"', num_keep=16, batch_size="4", device=None)
    assert (args.pruner, args.batch_size, args.device) == ("fopru:strategy=row,block=-1", 4, None)
    pruner = args.pruner_maker()(0)
    assert (pruner.name, pruner.strategy, pruner.block, pruner.num_keep) == ("fopru", "row", -1, 16)


def test_one_pruner_for_all_batches_but_where_it_draws():
    make = read(pruner="fopru", keep_ratio=0.25).pruner_maker()
    assert make(0) is make(4)
    assert make(0).keep_ratio == 0.25
    make = read(pruner="random", num_keep=4).pruner_maker()
    assert [make(start).seed for start in (0, 4)] == [0, 4]
    assert read(pruner="random", num_keep=4, seed=1).pruner_maker()(0).seed != 0


def test_stages_and_k():
    assert read(pruner="fastv:stages=[[1,16]]").pruner_maker()(0).stages == [[1, 16]]
    assert read(pruner="fastv:stages=[[1,K]]", num_keep=9).pruner_maker()(0).stages == [[1, 9]]
    assert read().pruner_maker()(0).name == "none"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "row"}, "NAME:KEY=VALUE"),
        ({"num_kep": 3}, "did you mean 'num_keep'"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"pretrained": None}, "lacks pretrained"),
        ({"pruner": "fopru"}, "num_keep=None"),
        ({"pruner": "fopro", "num_keep": 3}, "fopru"),
        ({"pruner": "fopru", "num_keep": 3, "keep_ratio": 0.5}, "pass one of them"),
        ({"pruner": "fastv:stages=[[1,K]]", "keep_ratio": 0.5}, "stands for num_keep"),
        (
            {"pruner": "fopru:num_keep=3", "max_keep": 4},
            "max_keep=4 would not count: fopru:num_keep=3 says how many tokens stay; leave it out.",
        ),
        ({"checkpoint": "here"}, "checkpoint='here' would not count: none takes no checkpoint"),
    ],
)
def test_wrong_arguments_are_named(given, message):
    with pytest.raises(ValueError, match="^[^\n]*" + message.replace("[", r"\[")):
        read(**given).pruner_maker()


def test_generation_arguments():
    greedy = GenerationArgs.read(
        {"temperature": 0, "do_sample": True, "top_p": 1.0, "num_beams": 2}
    )
    assert greedy.passed == {"num_beams": 2, "max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    drawn = GenerationArgs.read({"temperature": 0.5, "top_p": None, "max_new_tokens": 3})
    assert drawn.passed == {"temperature": 0.5, "max_new_tokens": 3, "do_sample": True}
    assert GenerationArgs.read({"image_aspect_ratio": "pad", "until": ["."]}).unused == (
        "image_aspect_ratio",
    )
    assert GenerationArgs.read({"until": ["\n\n", "."]}).cut("yes. it\n\nis") == "yes"
    assert GenerationArgs.read({}).cut("yes. it is") == "yes. it is"
    with pytest.raises(ValueError, match="until=3"):
        GenerationArgs.read({"until": 3})


def message(*parts, role="user"):
    kinds = {str: lambda text: {"type": "text", "text": text}}
    other = lambda image: {"type": "image", "url": image}  # noqa: E731
    return {"role": role, "content": [kinds.get(type(part), other)(part) for part in parts]}


def test_prompts_keep_the_order_of_their_parts(processor):
    red, blue = (Image.new("L", (4, 4), value) for value in (1, 2))
    asked = ask(
        processor,
        [message(red, "What?"), message("That.", role="assistant"), message("And", blue, "this?")],
    )
    assert [image.mode for image in asked.images] == ["RGB", "RGB"]
    assert [image.getpixel((0, 0))[0] for image in asked.images] == [1, 2]
    first, second = asked.text.split(processor.image_token)[1:]
    assert first.index("What?") < first.index("ASSISTANT: That.") < first.index("USER: And")
    assert "this?" in second


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"type": "video", "url": "a.mp4"}, "'video'"),
        ({"type": "image", "url": "nowhere.png"}, "nowhere.png"),
        ({"type": "image", "url": 3}, "int"),
        ({"type": "text", "text": "an <image> here"}, "'<image>'"),
    ],
)
def test_what_a_prompt_cannot_hold_is_refused(processor, part, problem):
    with pytest.raises(ValueError, match=problem):
        ask(processor, [{"role": "user", "content": [part]}])


def test_tasks_that_earlier_versions_wrote_find_what_they_include():
    earlier = SHIPPED.parents[1] / "lmms_tasks"
    for name in shipped_tasks():
        (line,) = (earlier / f"ocvtp_{name}_local.yaml").read_text().splitlines()[1:]
        included = earlier / line.removeprefix("include: ")
        assert included.resolve() == SHIPPED / f"ocvtp_{name}_local.yaml"


def test_a_written_task_asks_the_same(tmp_path, scoring):
    task = SceneTask(num_images=2, questions=3)
    path = export_task(task, tmp_path / "scenes")
    config = yaml.safe_load(path.read_text())
    assert Path(config["include"]).is_file()
    rows = [json.loads(line) for line in (path.parent / "questions.jsonl").open()]
    assert config["dataset_kwargs"] == {"data_files": {"test": "questions.jsonl"}}
    for item, row in zip(task.items, scoring.checked(rows), strict=True):
        assert (row["question"], row["answers"]) == (item.question, list(item.answers))
        assert np.array_equal(scoring.images(row)[0], task.image(item.owner))
    assert len({row["image"] for row in rows}) == 4
    found = scoring.scene_records(rows[0], [rows[0]["answers"][0]])
    assert {name: record["score"] for name, record in found.items()} == {"accuracy": 1, "easy": 1}


def test_lengths_of_answers_are_those_of_the_tasks():
    texts = {path.stem: path.read_text() for path in SHIPPED.glob("*.yaml")}
    assert sorted(texts) == [f"ocvtp_{name}_local" for name in shipped_tasks()]
    assert f"max_new_tokens: {SceneTask.max_new_tokens}\n" in texts["ocvtp_scenes_local"]
    assert "max_new_tokens: 16\n" in texts["ocvtp_pope_local"]


def test_pope_figures_are_those_of_evaluate(scoring):
    labels = ["yes", "no", "no", "yes", "no"]
    said = ["Yes, there is.", "yes", "No", "no.", "not at all"]
    rows = [
        {"image": "a.png", "question": "?", "answers": [label], "kind": kind}
        for label, kind in zip(labels, ("random", "random", "popular", "", None), strict=True)
    ]
    found = [scoring.pope_records(row, [text]) for row, text in zip(rows, said, strict=True)]
    items = [Item(str(n), 0, "?", (label,), "x") for n, label in enumerate(labels)]
    expected = pope_ratios(items, said)
    for name in ("precision", "recall", "f1", "yes_ratio"):
        figure = getattr(scoring, f"pope_{name}")([record[name] for record in found])
        assert figure == expected[f"all/{name}"].value
    for name in ("accuracy", "exact"):
        assert scoring.score([r[name] for r in found]) == expected[f"all/{name}"].value
    assert [record["score"] for r in found if (record := r.get("random"))] == [1, 0]


@pytest.mark.parametrize(
    ("row", "check"),
    [
        ({"image": "a.png", "question": "?"}, "checked"),
        ({"image": "a.png", "question": "", "answers": ["x"]}, "checked"),
        ({"image": None, "question": "?", "answers": ["x"]}, "checked"),
        ({"image": "a.png", "question": "?", "answers": ["maybe"]}, "checked_yes_no"),
    ],
)
def test_wrong_rows_are_named(scoring, row, check):
    good = {"image": "a.png", "question": "?", "answers": ["yes"]}
    assert getattr(scoring, check)([good]) == [good]
    with pytest.raises(ValueError, match="row 1 of the task"):
        getattr(scoring, check)([good, row])


def test_the_command_says_how_to_run_what_it_wrote(tmp_path, capsys):
    (tmp_path / "list.json").write_text('[{"image": "a.png", "question": "?", "answers": ["x"]}]')
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    words = ["lmms-task", "--task", "vqa", "--output", str(tmp_path / "out")]
    assert main([*words, "--questions-file", str(tmp_path / "list.json")]) == 0
    assert f"--include_path {tmp_path}/out --tasks ocvtp_vqa_local" in capsys.readouterr().out
    assert (tmp_path / "out" / "ocvtp_vqa_local.yaml").is_file()
    assert main(["lmms-task", "--task", "scenes", "--output", str(tmp_path)]) == 2
    assert "needs --model" in capsys.readouterr().err


def test_the_entry_point_imports_lmms_eval_only_when_called(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, _, function = project["entry-points"]["lmms_eval.models"]["ocvtp"].partition(":")
    for known in [key for key in sys.modules if key.partition(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, name, raising=False)
    manifest = getattr(importlib.import_module(name), function)
    with pytest.raises(ModuleNotFoundError, match="lmms_eval"):
        manifest()


def test_a_cap_is_a_budget_too():
    pruner = read(pruner="divprune", max_keep=9).pruner_maker()(0)
    assert (pruner.num_keep, pruner.keep_ratio, pruner.max_keep) == (None, None, 9)
    pruner = read(pruner="divprune", keep_ratio=0.5, max_keep=9).pruner_maker()(0)
    assert (pruner.keep_ratio, pruner.max_keep) == (0.5, 9)
    with pytest.raises(ValueError, match="num_keep=3 and max_keep=9; pass one of them"):
        read(pruner="divprune", num_keep=3, max_keep=9).pruner_maker()
    with pytest.raises(ValueError, match="stands for num_keep; pass that in place of max_keep=9"):
        read(pruner="fastv:stages=[[1,K]]", max_keep=9).pruner_maker()
