"""The whole road, on real images where there are any: train, export, plug in, answer, show."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


def run(*words: str) -> str:
    """A command in a process of its own, as a user runs it; returns its stdout."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_from_images_to_an_answer(coco_folder, tmp_path):
    checkpoints, logs = tmp_path / "checkpoints", tmp_path / "csv"
    run(
        *("train.py", "--config", "configs/train/coco_folder.yaml"),
        *("--data.root", str(coco_folder)),
        *("--trainer.max_epochs", "8", "--checkpoint.dirpath", str(checkpoints)),
        *("--trainer.default_root_dir", str(tmp_path)),
        "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: "
        + str(logs)
        + ", name: x}}",
    )
    assert {p.name for p in checkpoints.iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = list(csv.DictReader(next(logs.rglob("metrics.csv")).open()))
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0], losses
    scores = [float(row["val/mbo_i"]) for row in rows if row["val/mbo_i"]]
    assert all(0 < score < 1 for score in scores)

    artifact = tmp_path / "oc-pruner"
    run("export.py", "--checkpoint", str(checkpoints / "best.ckpt"), "--output", str(artifact))
    config = json.loads((artifact / "config.json").read_text())
    assert config["training"]["images"] == 50

    image = sorted((coco_folder / "val2017").glob("*.jpg"))[0]
    model = ["--model", "random:tiny-llava", "--checkpoint", str(artifact), "--num-keep", "16"]
    model += ["--image", str(image), "--json"]
    words = ["-m", "ocvtp.cli", "answer", "--pruner", "ocvtp", "--prompt", "What is it?", *model]
    facts = json.loads(run(*words))
    assert facts["visual_tokens_kept"] == [16]
    assert facts == json.loads(run(*words)), "the same call, another answer"

    picture = tmp_path / "kept.png"
    words = ["-m", "ocvtp.cli", "show", "--pruner", "ocvtp", "fastervlm", "uniform", "random"]
    run(*words, *model, "--output", str(picture))
    assert min(Image.open(picture).size) > 300


@pytest.mark.parametrize("name", ["clip-vit-large-patch14-336"])
def test_the_papers_tower_is_known_by_its_sizes(name):
    from ocvtp.encoders.clip import CLIPEncoder

    encoder = CLIPEncoder(f"random:{name}", layer=9)
    assert (encoder.feature_dim, encoder.grid_hw, encoder.depth) == (1024, (24, 24), 24)
    assert Path("configs/train/clip_l14_336.yaml").read_text().count(name) >= 1
