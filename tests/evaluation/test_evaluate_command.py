"""`ocvtp evaluate` from the command line, on every task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ocvtp.cli import main
from ocvtp.data.drawing import COLOURS
from ocvtp.data.scenes import write_scenes

DEMO = str(Path(__file__).parents[2] / "checkpoints" / "demo-vlm")


def words(output, task, *more, model="random:tiny-llava", budget=("--num-keep", "9")):
    common = ["evaluate", "--model", model, "--dtype", "float32", "--output", str(output)]
    return [*common, "--task", task, "--seeds", "1", *budget, *more]


def scenes(output, *more, **options):
    asked = ("--num-images", "3", "--questions", "2", "--levels", "easy")
    return words(output, "scenes", "--pruners", "fopru", "--no-controls", *asked, *more, **options)


def test_it_prints_a_table_and_writes_what_it_found(tmp_path, capsys):
    assert main(scenes(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "| `fopru`" in printed
    assert "only 6 questions" in printed
    names = {path.name for path in tmp_path.iterdir()}
    assert {"results.json", "report.md", "accuracy.png", "answers"} <= names
    facts = json.loads((tmp_path / "results.json").read_text())
    assert facts["schema"] == 1
    assert facts["settings"]["task"]["name"] == "scenes"
    assert set(facts["environment"]) >= {"device", "torch", "transformers"}
    assert facts["settings"]["command"].startswith("ocvtp ")
    asked = facts["answers"]["items"]
    assert set(asked[0]) == {"key", "question", "answers"}
    assert {len(some) for some in facts["answers"]["conditions"].values()} == {len(asked)}


def test_a_budget_is_asked_for_where_a_pruner_says_none(tmp_path, capsys):
    assert main(scenes(tmp_path, budget=())) == 2
    told = "pruner 'fopru' says no budget of its own; pass --num-keep, or a budget in its settings"
    assert told in capsys.readouterr().err
    assert main(words(tmp_path, "scenes", budget=())) == 2
    assert "nothing says how many tokens stay; pass --num-keep" in capsys.readouterr().err


@pytest.mark.slow
def test_budgets_of_their_own_are_enough(tmp_path, capsys):
    own = ("fopru:max_keep=9", "--no-controls", "--num-images", "2", "--questions", "1")
    assert main(words(tmp_path, "scenes", "--pruners", *own, budget=())) == 0
    assert "`fopru:max_keep=9`" in capsys.readouterr().out
    assert main(["table", str(tmp_path), "--format", "csv"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert [line.split(",")[:3:2] for line in found[1:3]] == [
        ["unpruned", "all"], ["fopru:max_keep=9", "9"]
    ]  # fmt: skip


@pytest.mark.slow
def test_json_is_one_object_and_the_same_again(tmp_path, capsys):
    assert main(scenes(tmp_path, "--json")) == 0
    first = capsys.readouterr().out
    assert main(scenes(tmp_path, "--json")) == 0
    assert json.loads(first)["rows"] == json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("pope", (), "--instances"),
        ("pope", ("--questions-file", "nowhere_random.json"), "--images"),
        ("vqa", (), "--questions-file"),
        ("coverage", (), "--images"),
        ("coverage", ("--images", "."), "--instances"),
        ("scenes", ("--num-images", "0"), "--num-images 0"),
        ("scenes", ("--pruners", "fopro"), "fopru"),
        ("scenes", ("--batch-size", "0"), "--batch-size"),
    ],
)
def test_what_is_missing_is_named(tmp_path, capsys, task, more, message):
    assert main(words(tmp_path, task, *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_coverage_of_drawn_scenes(tmp_path, capsys):
    write_scenes(tmp_path / "data", 1, 4, 96, 0)
    found = [str(tmp_path / "data" / name) for name in ("val2017", "annotations")]
    files = ["--images", found[0], "--instances", f"{found[1]}/instances_val2017.json"]
    more = ["--pruners", "divprune", *files, "--json"]
    output = tmp_path / "out"
    assert main(words(output, "coverage", *more, model=DEMO, budget=("--num-keep", "16"))) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["label"]: row["figures"] for row in facts["rows"]}
    assert "shuffled" not in rows
    assert rows["unpruned"]["coverage/all"]["value"] == 1
    assert rows["oracle"]["coverage/all"]["value"] == 1
    assert rows["random"]["coverage/all"]["value"] < rows["divprune"]["coverage/all"]["value"]
    assert rows["divprune"]["unrestored"]["value"] < rows["random"]["unrestored"]["value"]
    assert not any("oracle does not win" in warning["text"] for warning in facts["warnings"])


def test_vqa_from_a_list(tmp_path, capsys):
    write_scenes(tmp_path / "data", 1, 2, 96, 0)
    entries = [
        {"image": f"{n:012d}.jpg", "question": "What colour is the star?", "answers": ["red"]}
        for n in (1, 2)
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    files = ("--questions-file", str(tmp_path / "list.json"), "--images")
    more = (*files, str(tmp_path / "data" / "val2017"), "--pruners", "uniform", "--no-controls")
    assert main(words(tmp_path / "out", "vqa", *more, model=DEMO)) == 0
    assert "all/accuracy" in capsys.readouterr().out


@pytest.fixture
def instances(coco_folder, tmp_path):
    """COCO's file; of drawn scenes one that tells things apart by their colour too."""
    path = coco_folder / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    if len(content["categories"]) > 10:
        return path
    shapes = {category["id"]: category["name"] for category in content["categories"]}
    kinds = [f"{colour} {shape}" for colour in COLOURS for shape in shapes.values()]
    content["categories"] = [{"id": n, "name": kind} for n, kind in enumerate(kinds)]
    for thing in content["annotations"]:
        thing["category_id"] = kinds.index(f"{thing['colour']} {shapes[thing['category_id']]}")
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path / "instances.json"


@pytest.mark.slow
@pytest.mark.parametrize("model", [DEMO, "random:tiny-qwen2.5-vl"])
def test_pope_built_from_coco(coco_folder, instances, tmp_path, capsys, model):
    """Figures mean nothing here; the way from COCO's files to a report is real."""
    files = ["--instances", str(instances)]
    files += ["--images", str(coco_folder / "val2017"), "--num-images", "2"]
    more = ["--pruners", "divprune", "fopru:block=-1", *files, "--json"]
    budget = ("--keep-ratio", "0.25")
    assert main(words(tmp_path, "pope", *more, model=model, budget=budget)) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["label"]: row for row in facts["rows"]}
    assert {"divprune", "unpruned", "shuffled", "random", "untrained", "fill_only"} <= set(rows)
    names = {f"{s}/{m}" for s in ("random", "popular", "adversarial") for m in ("f1", "yes_ratio")}
    assert names <= set(rows["divprune"]["figures"])
    assert rows["unpruned"]["figures"]["all/accuracy"]["n"] == 36
    kept = {label: rows[label]["visual_tokens"] for label in ("unpruned", "divprune")}
    assert kept["divprune"] == pytest.approx(0.25 * kept["unpruned"], rel=0.1)
    if model == DEMO:
        assert "oracle" in rows
    lines = (tmp_path / "pope").iterdir()
    assert all(json.loads(path.read_text().splitlines()[0])["label"] == "yes" for path in lines)
