"""The whole road, on real images where there are any: train, export, plug in, answer, show."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from fresh_process import RUN, outputs
from PIL import Image

EPOCHS = 4
SCRIPT = "import runpy, sys; sys.argv = {words}; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.slow
def test_from_images_to_an_answer(coco_folder, tmp_path):
    """Each command in a process that knows nothing of the others."""
    checkpoints, logs = tmp_path / "checkpoints", tmp_path / "csv"
    train = [
        *("train.py", "--config", "configs/train/coco_folder.yaml"),
        *("--data.root", str(coco_folder)),
        *("--trainer.max_epochs", str(EPOCHS), "--checkpoint.dirpath", str(checkpoints)),
        *("--trainer.default_root_dir", str(tmp_path)),
        "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: "
        + str(logs)
        + ", name: x}}",
    ]
    artifact, picture = tmp_path / "oc-pruner", tmp_path / "kept.png"
    best = str(checkpoints / "best.ckpt")
    export = ["export.py", "--checkpoint", best, "--output", str(artifact)]
    image = sorted((coco_folder / "val2017").glob("*.jpg"))[0]
    model = ["--model", "random:tiny-llava", "--checkpoint", str(artifact), "--num-keep", "16"]
    model += ["--image", str(image), "--json"]
    answer = ["answer", "--pruner", "ocvtp", "--prompt", "What is it?", *model]
    show = ["show", "--pruner", "ocvtp", "fastervlm", "uniform", "random", *model]
    show += ["--output", str(picture)]
    scripts = [SCRIPT.format(words=words) for words in (train, export)]
    commands = [RUN.format(words=words) for words in (answer, answer, show)]
    first = "import torch, transformers, pytorch_lightning"
    _, _, facts, again, _ = outputs([*scripts, *commands], first=first)

    assert {p.name for p in checkpoints.iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = list(csv.DictReader(next(logs.rglob("metrics.csv")).open()))
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(losses) == EPOCHS
    assert losses[-1] < 0.8 * losses[0], losses
    scores = [float(row["val/mbo_i"]) for row in rows if row["val/mbo_i"]]
    assert all(0 < score < 1 for score in scores)
    config = json.loads((artifact / "config.json").read_text())
    assert config["training"]["images"] == 50
    assert json.loads(facts)["visual_tokens_kept"] == [16]
    assert json.loads(facts) == json.loads(again), "the same call, another answer"
    assert min(Image.open(picture).size) > 300


@pytest.mark.parametrize("name", ["clip-vit-large-patch14-336"])
def test_the_papers_tower_is_known_by_its_sizes(name):
    from ocvtp.encoders.clip import CLIPEncoder

    encoder = CLIPEncoder(f"random:{name}", layer=9)
    assert (encoder.feature_dim, encoder.grid_hw, encoder.depth) == (1024, (24, 24), 24)
    assert Path("configs/train/clip_l14_336.yaml").read_text().count(name) >= 1
