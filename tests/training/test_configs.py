"""Every YAML file of configs/ builds what it describes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from ocvtp.encoders.tiles import TiledEncoder

CONFIGS = sorted(Path("configs/train").glob("*.yaml"))
SELECTORS = sorted(Path("configs/train/selector").glob("*.yaml"))
TOWERS = {"llava-v1.6-vicuna-7b-hf": "clip-vit-large-patch14-336"}  # of models named as towers


@pytest.mark.parametrize("path", [*CONFIGS, *SELECTORS], ids=lambda p: p.stem)
def test_headers_say_what_to_expect(path):
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    for word in ("command:", "hardware:", "expected:"):
        assert word in header
    assert "time:" in header or "hours:" in header
    name = path.relative_to("configs/train").with_suffix("").as_posix()
    assert f"configs/train/{name}.yaml" in header or f"--config {name}" in header


@pytest.mark.sampled(1)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_build(path, tmp_path, monkeypatch):
    """With the network of the file, and random weights where the file names a hub id."""
    from ocvtp.training.run import build

    words = ["--config", str(path), "--trainer.default_root_dir", str(tmp_path)]
    words += ["--trainer.logger", "false"]
    encoder = yaml.safe_load(path.read_text())["model"]["encoder"]
    tower = encoder["init_args"]["tower"]
    if tower.startswith("local-dir:"):
        assert "python -m tools.photo_tower" in path.read_text()
        words += ["--model.encoder.tower", "vit_small_patch14_dinov2"]
        words += ["--model.encoder.pretrained", "false"]
    elif not tower.startswith("random:") and not Path(tower).is_dir():
        name = tower.split("/")[-1]
        words += ["--model.encoder.tower", f"random:{TOWERS.get(name, name)}"]
    with torch.device("meta"):  # sizes only
        monkeypatch.setattr("ocvtp.encoders.base.FrozenEncoder.load", lambda self, needs: self)
        cli = build(words)
    settings = yaml.safe_load(path.read_text())["model"]
    network = cli.model.network
    sizes = settings["network"].get("init_args")  # of other networks than the OC-pruner's
    held = network.config if sizes is None else network.config.sizes
    for name, value in (sizes or settings["network"]).items():
        assert getattr(held, name) == value
    assert network.config.layer == settings["encoder"]["init_args"]["layer"]
    assert cli.datamodule.transform is cli.model.encoder.transform


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", SELECTORS, ids=lambda p: p.stem)
def test_recipes_of_selectors_build(path, tmp_path):
    from ocvtp.training.run import build

    words = ["--config", str(path), "--output", str(tmp_path), "--trainer.logger", "false"]
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]
    if settings.get("warm_start"):
        assert settings["warm_start"] in path.read_text().split("seed_everything")[0]
        words += ["--model.warm_start", "null"]
    module = build(words).model
    assert module.recipe == path.stem
    scorer = settings["scorer"]
    assert type(module.network.scorer).__name__ == scorer["class_path"].rpartition(".")[2]
    for name, value in scorer.get("init_args", {}).items():
        assert module.network.config.sizes[name] == value
    assert [loss.name for loss in module.losses] == list(settings["losses"])


def test_the_papers_recipe_has_the_papers_sizes():
    settings = yaml.safe_load(Path("configs/train/clip_l14_336.yaml").read_text())
    assert settings["model"]["num_slots"] == [16, 32, 64, 128]
    assert settings["data"]["init_args"]["batch_size"] == 12
    assert settings["trainer"]["max_epochs"] == 30
    assert settings["trainer"]["gradient_clip_val"] == 1.0


def test_the_recipe_for_tiles_has_all_their_tokens():
    settings = yaml.safe_load(Path("configs/train/llava_next_7b.yaml").read_text())["model"]
    assert settings["num_slots"] == [640, 320, 160, 80]
    encoder = TiledEncoder("random:clip-vit-large-patch14-336", layer=9)
    assert encoder.max_tokens == 2880
    assert encoder.transform.describe()["image_grid_pinpoints"] == [
        [336, 672],
        [672, 336],
        [672, 672],
        [1008, 336],
        [336, 1008],
    ]
