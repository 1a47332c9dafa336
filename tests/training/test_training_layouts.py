"""Training on every kind of encoder: each configuration, shrunk; tiles and variable grids."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.testing import assert_close

from ocvtp.encoders.qwen import QwenEncoder
from ocvtp.encoders.tiles import TiledEncoder
from ocvtp.export import export_checkpoint
from ocvtp.slots import OCPruner
from ocvtp.slots.config import NetworkSizes
from ocvtp.slots.decoder import DecoderConfig
from ocvtp.slots.kept import KeptObjective
from ocvtp.slots.objectives import SlotsObjective
from ocvtp.training.callbacks import _side_by_side
from ocvtp.training.module import OCPrunerModule
from ocvtp.training.run import train

SIZES = [(90, 140), (150, 101), (64, 200), (96, 96), (111, 112), (180, 60)]  # heights and widths
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64}
SIGLIP |= {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
TIMM = {"embed_dim": 48, "num_heads": 3, "depth": 3, "img_size": 64}
CLIP = {"tower": "random:tiny", "layer": 2, "dtype": "float32"}
QWEN = {"tower": "random:tiny-qwen2.5-vl", "layer": 2, "image_size": 84}
QWEN |= {"min_pixels": 3136, "max_pixels": 31360, "dtype": "float32"}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Images of several shapes in COCO's layout, each with a rectangle as its instance."""
    root, random = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "box"}]}
        for number, (height, width) in enumerate(SIZES, start=1):
            pixels = random.integers(0, 99, (height, width, 3), dtype=np.uint8)
            pixels[10:40, 20:50] = 255
            name = f"{number:03d}.png"
            Image.fromarray(pixels).save(root / split / name)
            content["images"].append(
                {"id": number, "file_name": name, "height": height, "width": width}
            )
            corners = [[20, 10, 50, 10, 50, 40, 20, 40]]
            content["annotations"].append(
                {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0}
                | {"segmentation": corners, "area": 900, "bbox": [20, 10, 30, 30]}
            )
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return root


def shrunk(config, folder, root, encoder, kind=None):
    """A file of configs/ with another encoder, for two steps on a CPU."""
    content = yaml.safe_load(Path(f"configs/train/{config}.yaml").read_text())
    content["model"]["encoder"]["init_args"] = encoder
    if kind:
        content["model"]["encoder"]["class_path"] = kind
    content["model"]["network"] |= {"hidden_dim": 32, "slot_dim": 16, "ffn_dim": 32}
    if decoder := content["model"]["objective"]["init_args"].get("decoder"):
        decoder |= {"num_layers": 1, "num_heads": 2, "ffn_dim": 32}
    slots = [min(s, 12) for s in content["model"]["num_slots"]]
    content["model"] |= {"num_slots": slots, "val_num_slots": 6}
    content["data"]["class_path"] = "ocvtp.data.module.CocoDataModule"
    batch_size = 3 // content["trainer"].get("accumulate_grad_batches", 1)
    settings = {"root": str(root), "batch_size": batch_size, "val_batch_size": 3}
    content["data"]["init_args"] = settings
    logger = {"class_path": "pytorch_lightning.loggers.CSVLogger"}
    logger["init_args"] = {"save_dir": str(folder), "name": "csv"}
    content["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 1, "logger": [logger]}
    content["trainer"] |= {"default_root_dir": str(folder), "accelerator": "cpu"}
    content["checkpoint"]["dirpath"] = str(folder / "checkpoints")
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(content))
    return ["--config", str(path)]


TILED = {**CLIP, "slots": "joint", "dtype": "bfloat16"}
CASES = {
    "clip_l14_336": (CLIP, None, "grid"),
    "coco_folder": (CLIP, None, "grid"),
    "scenes": (CLIP, None, "grid"),
    "scenes_kept": (CLIP, None, "grid"),
    "clip_l14_336_kept": (CLIP, None, "grid"),
    "kept in tiles": (TILED, "ocvtp.encoders.tiles.TiledEncoder", "joint"),
    "siglip": ({**CLIP, "tower": SIGLIP}, None, "grid"),
    "timm": (
        {"tower": "vit_tiny_patch16_224", "layer": 2, "pretrained": False, "model_args": TIMM},
        "ocvtp.encoders.timm.TimmEncoder",
        "grid",
    ),
    "llava_next_7b": (TILED, None, "joint"),
    "tiles apart": ({**TILED, "slots": "per_tile"}, None, "per_tile"),
    "siglip in tiles": ({**TILED, "tower": SIGLIP}, None, "joint"),
    "qwen2_5_vl_7b": (QWEN, None, "variable"),
}
OTHERS = {"siglip": "clip_l14_336", "timm": "clip_l14_336", "kept in tiles": "clip_l14_336_kept"}
OTHERS |= {"tiles apart": "llava_next_7b", "siglip in tiles": "llava_next_7b"}


def test_every_configuration_is_trained_here():
    apart = {"demo_kept"}  # trained by `make demo`
    apart |= {"photos_kept", "photos_slots", "photos_surprise"}  # by `make photos`
    assert {path.stem for path in Path("configs/train").glob("*.yaml")} <= CASES.keys() | apart


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_configuration_trains(tmp_path, shapes, case):
    encoder, kind, layout = CASES[case]
    words = shrunk(OTHERS.get(case, case), tmp_path, shapes, encoder, kind)
    result = train(words)
    assert result.best_score is not None
    rows = list(csv.DictReader(open(tmp_path / "csv/version_0/metrics.csv")))
    assert len([row for row in rows if row["train/loss"]]) == 2
    for name in ("val/loss", "val/coverage_distance", "val/fg_ari", "val/mbo_i"):
        (value,) = [float(row[name]) for row in rows if row[name]]
        assert np.isfinite(value), name
    (picture,) = tmp_path.glob("csv/version_0/pictures/*.png")
    assert min(Image.open(picture).size) > 100
    made = export_checkpoint(result.best, tmp_path / "artifact")
    said = OCPruner.from_pretrained(tmp_path / "artifact").config
    assert said == made.config
    assert (said.layout, said.layer) == (layout, 2)
    assert said.training["images"] == 6
    sides = {"joint": said.preprocessing.get("image_grid_pinpoints")}
    sides |= {"per_tile": sides["joint"], "variable": said.preprocessing.get("max_pixels")}
    assert sides.get(layout, "one size")


def module(layout, decoder="masked_transformer"):
    if layout == "variable":
        encoder = QwenEncoder(**QWEN)
    else:
        encoder = TiledEncoder("random:tiny", layer=2, slots=layout)
    objective = SlotsObjective(DecoderConfig(kind=decoder, num_layers=1, num_heads=2, ffn_dim=32))
    sizes = NetworkSizes(hidden_dim=32, slot_dim=16, ffn_dim=32, noise_rows=64)
    return OCPrunerModule(encoder, objective, sizes, num_slots=[4, 8], val_num_slots=6)


@pytest.mark.parametrize("layout", ["variable", "joint"])
def test_batches_hold_images_of_any_shape(shapes, layout):
    from test_training import data

    model = module(layout)
    images = data(shapes, model, val_batch_size=6)
    images.setup("validate")
    (batch,) = images.val_dataloader()
    assert batch["image_sizes"] == SIZES
    assert isinstance(batch["pixel_values"], list)
    tokens = model.encoder(batch["pixel_values"], batch["image_sizes"])
    if layout == "joint":  # tiles without the padding have the shape of the image
        assert torch.is_tensor(batch["instances"])
        for (height, width), (rows, columns) in zip(
            SIZES, tokens.grids[:, 1].tolist(), strict=True
        ):
            assert abs(rows / columns - height / width) < 0.2 * height / width
    else:
        shapes_of_masks = [tuple(ids.shape) for ids in batch["instances"]]
        assert shapes_of_masks == [tuple(image.shape[1:]) for image in batch["pixel_values"]]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layout", ["variable", "joint", "per_tile"])
def test_validation_does_not_depend_on_the_batches(tmp_path, shapes, layout):
    from test_training import data, trainer

    model, run = module(layout), trainer(tmp_path)
    figures = [
        run.validate(model, data(shapes, model, val_batch_size=size), verbose=False)[0]
        for size in (1, 3, 6)
    ]
    assert {"val/fg_ari", "val/mbo_i", "val/relative_mse"} <= figures[0].keys()
    for other in figures[1:]:
        for name, value in figures[0].items():
            assert other[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.slow
def test_the_objective_kept_on_a_variable_grid(tmp_path, shapes):
    """Some images have fewer tokens than others, and fewer than there are slots."""
    from test_training import data, trainer

    slots = {"num_slots": [4, 16], "val_num_slots": 16}
    one_to_one = NetworkSizes(32, 16, 32, truncation="none", standardize=True, choice="one_to_one")
    encoder = QwenEncoder(**{**QWEN, "image_size": 168, "max_pixels": 15680})
    model = OCPrunerModule(encoder, KeptObjective(weights="none"), one_to_one, **slots)
    images, run = data(shapes, model, val_batch_size=6), trainer(tmp_path, max_epochs=2)
    images.setup("validate")
    (batch,) = images.val_dataloader()
    counts = model.encoder(batch["pixel_values"], batch["image_sizes"]).valid.sum(dim=1)
    assert counts.min() < 16 < counts.max()
    run.fit(model, data(shapes, model, batch_size=3))
    figures = [
        run.validate(model, data(shapes, model, val_batch_size=size), verbose=False)[0]
        for size in (1, 3, 6)
    ]
    assert {"val/ridge_error", "val/teacher", "val/coverage_residual"} <= figures[0].keys()
    for other in figures[1:]:
        for name, value in figures[0].items():
            assert other[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["masked_transformer", "mlp"])
@pytest.mark.parametrize("layout", ["variable", "joint", "per_tile"])
def test_the_loss_falls(tmp_path, shapes, layout, decoder):
    from test_training import data, trainer

    model, run = module(layout, decoder), trainer(tmp_path, max_epochs=8)
    model.lr = 3e-3
    before = run.validate(model, data(shapes, model), verbose=False)[0]["val/loss"]
    run.fit(model, data(shapes, model, batch_size=3, val_images=None, val_annotations=None))
    after = run.validate(model, data(shapes, model), verbose=False)[0]["val/loss"]
    assert after < 0.93 * before


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layout", ["variable", "joint"])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, shapes, layout):
    from pytorch_lightning.callbacks import ModelCheckpoint
    from test_training import data, trainer, weights

    def fit(folder, epochs, resume=None):
        model = module(layout)
        saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1)
        run = trainer(folder, max_epochs=2, callbacks=[saver], limit_val_batches=0)
        run.fit_loop.max_epochs = epochs
        run.fit(model, data(shapes, model, batch_size=2), ckpt_path=resume, weights_only=True)
        return model

    straight = fit(tmp_path / "straight", 2)
    resumed = fit(tmp_path / "resumed", 2, tmp_path / "straight" / "step=3.ckpt")
    assert_close(weights(resumed), weights(straight), rtol=0, atol=0)


def test_pictures_of_any_shape_stand_side_by_side():
    images = [torch.zeros(3, 20, 30), torch.zeros(3, 40, 10)]
    masks = [torch.rand(4, 2, 3), torch.rand(4, 4, 1)]
    picture = _side_by_side(images, masks)
    assert picture.shape == (2 * (40 + 4) + 4, 30 + 8 + 10 + 8, 3)
    assert (picture[4:24, 4:34] == 0).all()
    assert (picture[4:44, 42:52] == 0).all()
    assert (picture[52:, :38] == 255).all()  # below the lower one: 2 * (20 + 4) + 4


def test_slots_up_to_the_tokens_of_all_tiles():
    encoder = TiledEncoder("random:tiny", layer=2)
    assert encoder.max_tokens == 5 * 144
    OCPrunerModule(encoder, SlotsObjective(DecoderConfig(num_layers=1)), num_slots=[720])
    with pytest.raises(ValueError, match="721 slots for 720 tokens"):
        OCPrunerModule(encoder, num_slots=[721])
    with pytest.raises(ValueError, match="145 slots for 144 tokens"):
        OCPrunerModule(TiledEncoder("random:tiny", layer=2, slots="per_tile"), num_slots=[145])


def test_joint_tiles_have_positions_of_their_own():
    network = module("joint").network
    assert network.decoder.positions.weight.shape == (2, 144, 64)
    assert module("per_tile").network.decoder.positions.weight.shape == (1, 144, 64)
    assert torch.equal(network.without_decoder().queries.mean, network.queries.mean)
