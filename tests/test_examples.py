"""The examples run, as a user runs them, and do what they say."""

from __future__ import annotations

import ast
import csv
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ocvtp.data.questions import ask
from ocvtp.data.scenes import draw_scene
from ocvtp.pruners import registry

EXAMPLES = Path("examples").absolute()
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """Run an example in an empty folder that has what the repository's root has to offer."""
    for name in ("checkpoints", "configs"):
        (tmp_path / name).symlink_to(Path(name).absolute())
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *words])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return str(capsys.readouterr().out)

    return run


def functions(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_the_readme_lists_them_all():
    listed = re.findall(r"^\| \[(\S+)\]\((\S+)\)", (EXAMPLES / "README.md").read_text(), re.M)
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {name for name, _ in listed} == {link for _, link in listed} == there


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_docstring_has_a_command_whose_flags_exist(name, example, capsys):
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
    assert f"    python examples/{name}.py\n" in text
    with pytest.raises(SystemExit) as status:
        example(name, "--help")
    registry._REGISTRY.pop("contrast", None)
    assert status.value.code == 0
    known = capsys.readouterr().out
    for flag in re.findall(r"--[a-z-]+", text):
        assert flag in known, flag


@pytest.mark.slow
def test_pipeline(example):
    lines = example("pipeline").splitlines()
    assert re.search(r"144 tokens +36 tokens \(divprune\)", lines[1])
    rows = [line.split() for line in lines[2:]]
    assert len(rows) == 6
    for name, whole, pruned in rows:
        assert name.endswith(".jpg")
        assert whole.isdigit()
        assert pruned.isdigit()
    assert len({whole for _, whole, _ in rows}) > 1, "one answer to all images"
    assert example("pipeline", "--batch-size", "1").splitlines() == lines


@pytest.mark.slow
def test_serve_folder_answers_right_and_goes_on_where_it_stood(example, tmp_path):
    out = example("serve_folder", "--output", "a.jsonl")
    assert "0 images are answered, 64 to go" in out
    assert re.search(
        r"64 images in .* a second, with 36 of 144 visual tokens each \(divprune\)", out
    )
    whole = (tmp_path / "a.jsonl").read_text()
    answers = {r["image"]: r["answer"] for r in map(json.loads, whole.splitlines())}
    stars = stars_of(tmp_path / "outputs/examples/serve/scenes")
    right = np.mean([answers[name] == str(count) for name, count in stars.items()])
    assert len(answers) == 64
    assert right > 0.6

    lines = whole.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:48]) + lines[48][:20])  # stopped in a line
    assert "48 images are answered, 16 to go" in example("serve_folder", "--output", "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == whole
    assert "64 images are answered, 0 to go" in example("serve_folder", "--output", "a.jsonl")
    with pytest.raises(ValueError, match="answers under other settings.* pass another --output"):
        example("serve_folder", "--output", "a.jsonl", "--num-keep", "8")


def stars_of(root: Path) -> dict[str, int]:
    found = json.loads((root / "annotations/instances_val2017.json").read_text())
    names = {image["id"]: image["file_name"] for image in found["images"]}
    (star,) = (c["id"] for c in found["categories"] if c["name"] == "star")
    counts = dict.fromkeys(names.values(), 0)
    for item in found["annotations"]:
        counts[names[item["image_id"]]] += item["category_id"] == star
    return counts


@pytest.mark.slow
def test_compare_pruners_on_images_of_ones_own(example, tmp_path):
    (tmp_path / "mine").mkdir()
    listed = []
    for number in range(3):
        scene = draw_scene(seed=5, index=number)
        Image.fromarray(scene.image).save(tmp_path / f"mine/{number}.png")
        (question,) = ask(scene.objects, 1, np.random.default_rng(number))
        entry = {"image": f"{number}.png", "question": question.text, "answers": [question.answer]}
        listed.append(entry)
    (tmp_path / "mine.json").write_text(json.dumps(listed))
    words = ["--images", "mine", "--questions", "mine.json", "--dtype", "float32"]
    words += ["--pruners", "divprune", "fastervlm", "--num-keep", "16", "--output", "out"]
    out = example("compare_pruners", *words)
    assert "| `divprune` " in out
    assert "| `random` (control, 3 seeds) " in out
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    kept = {row["label"]: row["visual_tokens"] for row in rows}
    assert kept["divprune"] == kept["fastervlm"] == 16
    assert kept["unpruned"] == 144
    assert min(Image.open(tmp_path / "out/kept.png").size) > 300
    with pytest.raises(SystemExit):
        example("compare_pruners", "--images", "mine")


@pytest.mark.slow
def test_compare_pruners_on_drawn_scenes(example, tmp_path, monkeypatch):
    monkeypatch.setattr("ocvtp.data.questions.ask", lambda objects, num, rng: ask(objects, 2, rng))
    out = example("compare_pruners", "--dtype", "float32")
    assert "`visionzip`" in out
    found = json.loads((tmp_path / "outputs/examples/compare/results.json").read_text())
    values = {
        (row["label"], row["num_keep"]): row["figures"]["all/accuracy"]["value"]
        for row in found["rows"]
    }
    assert values["unpruned", None] > 0.8
    assert values["unpruned", None] > values["shuffled", None] + 0.2
    assert values["divprune", 36] > values["random", 8]


@pytest.mark.slow
def test_train_on_your_images(example, tmp_path):
    out = example("train_on_your_images")
    assert "How many stars are there in the image? " in out
    assert "[16 visual tokens of " in out
    root = tmp_path / "outputs/examples/train"
    config = json.loads((root / "oc-pruner/config.json").read_text())
    assert config["training"]["images"] == 54
    rows = list(csv.DictReader(next(root.rglob("metrics.csv")).open()))
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_any_folder_becomes_cocos_layout(tmp_path):
    images, root = tmp_path / "images", tmp_path / "coco"
    for number in range(21):  # of two names only, in folders, of both kinds
        path = images / f"{number // 2}" / ("a.png" if number % 2 else "a.JPEG")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    lay_out = functions("train_on_your_images")["lay_out"]
    for _ in range(2):  # again over what is there
        lay_out(images, root)
        names = {split: sorted(p.name for p in (root / split).iterdir()) for split in SPLITS}
        assert [len(names[split]) for split in SPLITS] == [18, 3]
        assert not set(names["train2017"]) & set(names["val2017"])
    targets = {p.resolve() for split in SPLITS for p in (root / split).iterdir()}
    assert targets == {p.resolve() for p in images.rglob("a.*")}
    with pytest.raises(ValueError, match="holds 2 images; pass a folder of 10 or more"):
        lay_out(images / "0", root)


SPLITS = ("train2017", "val2017")


def test_your_own_pruner(example):
    try:
        out = example("your_own_pruner")
        again = registry.build_pruner("contrast", num_keep=3)
    finally:
        registry._REGISTRY.pop("contrast", None)
    assert "contrast keeps to the contract" in out
    assert re.search(r"How many circles are there in the image\? \d", out)
    assert again.name == "contrast"


@pytest.mark.slow
def test_the_notebook_runs_and_is_stored_without_outputs(monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    (judging,) = (cell for cell in cells if "num_images=20" in cell.source)
    judging.source = judging.source.replace("num_images=20", "num_images=2")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))  # where ocvtp is not installed
    resources = {"metadata": {"path": str(EXAMPLES)}}  # as Jupyter does
    NotebookClient(notebook, timeout=300, resources=resources).execute()  # raises what cells raise
    printed = "".join(o.text for cell in cells for o in cell.outputs if o.get("name") == "stdout")
    assert "(all 144 visual tokens)" in printed
    assert "(16 of them)" in printed
    shown = [o.data for cell in cells for o in cell.outputs if "data" in o]
    assert sum("image/png" in data for data in shown) == 3
    tables = "".join(data.get("text/markdown", "") for data in shown)
    assert "| `divprune` " in tables
