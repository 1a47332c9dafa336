"""`make photos` from end to end, with drawn scenes as photographs and a tiny tower."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_timm import tiny_timm

from ocvtp.cli import main
from ocvtp.data.scenes import write_scenes

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What it says in a folder where nothing was made yet."""
    for name in ("Makefile", "configs", "pyproject.toml"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    # The suite itself may be a recipe of make, whose flags and depth are not those of a shell.
    shell = ["env", *(f"--unset={name}" for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"))]
    command = [*shell, "make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """A folder with the photographs and the masks, and the commands that make would run there."""
    folder = tmp_path_factory.mktemp("photos")
    write_scenes(folder / "photos", num_train=8, num_val=0, size=112, seed=1)
    write_scenes(folder / "coco", num_train=2, num_val=3, size=112, seed=2)
    words = ["--dry-run", "photos", "PHOTO_SEEDS=0 1", "PHOTO_VAL=2", "BIN=BIN"]
    run = make(folder, *words, "PHOTOS=photos/train2017", "COCO=coco")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.replace("\\\n", " ").splitlines()
    once = dict.fromkeys(line for line in lines if line.startswith("BIN/"))  # each make says all
    return folder, [shlex.split(line) for line in once if " pip " not in line]


def test_the_steps_are_in_their_order(steps):
    _, commands = steps
    names = [" ".join(c[:3] if c[1] == "-m" else c[:2]) for c in commands]
    assert names[:3] == ["BIN/python -m tools.photo_tower", *["BIN/ocvtp extract"] * 2]
    assert names[3:15] == ["BIN/ocvtp train", "BIN/ocvtp export"] * 6
    assert names[15:] == ["BIN/ocvtp evaluate", *["BIN/ocvtp show"] * 6]


def parted(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Words, the sign of a file to write, and that file."""
    place = words.index(">") if ">" in words else len(words)
    return words[:place], words[place : place + 1], words[place + 1 :]


def tiny(command: str, words: list[str]) -> list[str]:
    """The same for 64 tokens, two steps, and pictures of one photograph."""
    if command in ("extract", "train"):
        if any("surprise" in word for word in words):
            sizes = {"network.init_args.hidden_dim": 8}
        else:
            sizes = {f"network.{name}": 16 for name in ("hidden_dim", "slot_dim", "ffn_dim")}
        sizes |= {"encoder.model_args.img_size": 112, "num_slots": "[8,16]", "val_num_slots": 8}
        words = [*words, *(f"--model.{name}={value}" for name, value in sizes.items())]
    if command == "train":
        steps = {"max_steps": 2, "val_check_interval": 1, "accelerator": "cpu"}
        words = [*words, "--data.init_args.batch_size=6"]
        return [*words, *(f"--trainer.{name}={value}" for name, value in steps.items())]
    if command == "show":
        first = words.index("--image") + 1
        words = [*words[: first + 1], *words[words.index("--output") :]]
    if command == "evaluate":
        words = " ".join(words).replace("--num-keep 128 64 32 16", "--num-keep 16 8").split()
    return ["112" if word == "336" else word for word in words]


@pytest.mark.slow
def test_from_photographs_to_a_report(steps, monkeypatch, capsys):
    folder, commands = steps
    monkeypatch.chdir(folder)
    tiny_timm(folder / "outputs/photos/tower", depth=12, img_size=112)
    for _, command, *words in commands:
        if command == "-m":  # the tower is the one above
            continue
        words, _, where = (list(group) for group in parted(words))
        capsys.readouterr()
        assert main([command, *tiny(command, words)]) == 0, capsys.readouterr().err
        for name in where:
            Path(name).write_text(capsys.readouterr().out)
    photos = folder / "outputs/photos"
    manifest = json.loads((photos / "features/manifest.json").read_text())
    counts = {k: sum(len(s["images"]) for s in v) for k, v in manifest["shards"].items()}
    assert counts == {"train": 6, "validation": 2}
    facts = json.loads((photos / "judged/summary.part").read_text())
    rows = {(row["label"], row["num_keep"]): row for row in facts["rows"]}
    for objective in ("slots", "kept"):
        name = f"ocvtp:checkpoint=outputs/photos/pruners/{objective}/0"
        assert rows[name, 16]["seeds"] == 2
        config = json.loads((photos / f"pruners/{objective}/1/config.json").read_text())
        assert (config["objective"], config["training"]["seed"]) == (objective, 1)
        assert config["tower"] == "timm:local-dir:outputs/photos/tower"
    assert rows["surprise", 16]["seeds"] == rows["surprise:balance=0.5", 16]["seeds"] == 2
    untrained = {label for label, _ in rows if label.startswith("untrained")}
    assert {"untrained", "untrained:standardize=true", "untrained:surprise"} <= untrained
    assert [row["label"] for row in facts["rows"] if row["num_keep"] == 8 and row["note"]] == [
        name for name in ("divprune", "todre") if rows[name, 8]["note"]
    ]
    assert all(row["figures"] for row in facts["rows"])  # the tower can feed them all
    assert rows["unpruned", None]["figures"]["coverage/all"]["images"] == 5
    for name in ("surprise", "kept", "slots"):
        shown, hidden = (
            np.asarray(Image.open(photos / where / f"{name}.png").convert("RGB"))
            for where in ("", "hidden")
        )
        assert shown.shape != hidden.shape
        assert hidden.std() > 10


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("photos", "there is no folder photos; put photographs into it"),
        ("coco", "there is no coco/annotations/instances_val2017.json; put COCO's"),
    ],
)
def test_what_is_missing_is_one_line(missing, told, tmp_path):
    for name in ("photos", "coco/train2017", "coco/val2017", "coco/annotations"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "coco/annotations/instances_train2017.json").touch()
    if missing == "photos":
        (tmp_path / missing).rmdir()
    run = make(tmp_path, "photos-inputs", "PHOTOS=photos", "COCO=coco")
    assert run.returncode != 0
    first, *rest = run.stderr.splitlines()
    assert first.startswith(f"make photos: {told}")
    assert all(line.startswith("make: *** ") for line in rest)
    assert not (tmp_path / "outputs").exists()


def test_a_folder_that_was_made_of_other_photographs_is_refused(tmp_path):
    for name in ("a", "b", "coco/train2017", "coco/val2017", "coco/annotations"):
        (tmp_path / name).mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"coco/annotations/instances_{split}2017.json").touch()
    words = ["photos-inputs", "COCO=coco"]
    assert make(tmp_path, *words, "PHOTOS=a").returncode == 0
    assert make(tmp_path, *words, "PHOTOS=a").returncode == 0
    run = make(tmp_path, *words, "PHOTOS=b")
    assert run.returncode != 0
    assert "outputs/photos is of PHOTOS=a COCO=coco PHOTO_VAL=50" in run.stderr
    assert "pass these, or remove that folder" in run.stderr


def test_both_configurations_read_one_folder_of_features():
    kept, slots = (
        yaml.safe_load((ROOT / f"configs/train/photos_{name}.yaml").read_text())
        for name in ("kept", "slots")
    )
    assert kept["model"]["encoder"] == slots["model"]["encoder"]
    assert kept["data"]["init_args"]["root"] == slots["data"]["init_args"]["root"]
    assert max(kept["model"]["num_slots"]) <= kept["model"]["network"]["noise_rows"]
