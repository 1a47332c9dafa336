"""The tower runs once: features in files, and training on them."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_training import DECODER, SIZES, Kill, scenes, settings_file, trainer
from test_training_layouts import QWEN, shapes
from torch.testing import assert_close

from ocvtp.cli import main
from ocvtp.data.features import FeatureDataModule
from ocvtp.data.folder import FolderDataModule
from ocvtp.data.module import CocoDataModule
from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.encoders.qwen import QwenEncoder
from ocvtp.encoders.tiles import TiledEncoder
from ocvtp.images import most_pixels
from ocvtp.slots.config import NetworkSizes
from ocvtp.slots.kept import KeptObjective
from ocvtp.slots.objectives import SlotsObjective
from ocvtp.training.extraction import Extraction
from ocvtp.training.module import PrunerModule

__all__ = ["scenes", "shapes"]

KEPT = NetworkSizes(
    hidden_dim=32,
    slot_dim=16,
    ffn_dim=32,
    noise_rows=64,
    standardize=True,
    choice="one_to_one",
    truncation="none",
)


def module(kind="slots", encoder=None, load_tower=True):
    encoder = encoder or CLIPEncoder("random:tiny", layer=2)
    sizes, objective = SIZES, SlotsObjective(DECODER)
    if kind == "kept":
        sizes, objective = KEPT, KeptObjective(target_layer=-2, weights="cls")
    return PrunerModule(
        encoder, objective, sizes, [4, 8], 6, statistics_images=20, load_tower=load_tower
    )


def images(root, model, **options):
    options = {"batch_size": 4, "transform": model.encoder.transform} | options
    return CocoDataModule(root=str(root), **options)


def extract(folder, model, data, **options):
    options = {"dtype": "float32", "shard_size": 10} | options
    return Extraction(model, data, folder, **options).run()


def features(folder, model, **options):
    options = {"batch_size": 4, "transform": model.encoder.transform} | options
    return FeatureDataModule(str(folder), **options)


class Losses(pl.Callback):
    """Those of every training step, and the figures of every validation."""

    def __init__(self):
        self.steps, self.validations = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, pl_module):
        named = trainer.callback_metrics.items()
        self.validations.append({k: float(v) for k, v in named if k.startswith("val/")})


def fit(folder, model, data, stop=None, resume=None, epochs=2):
    losses = Losses()
    saver = pl.callbacks.ModelCheckpoint(
        folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    run = trainer(folder, max_epochs=epochs, callbacks=[losses, saver, Kill(stop)])
    try:
        run.fit(model, data, ckpt_path=resume, weights_only=True)
    except InterruptedError:
        assert run.global_step == stop
    return losses


def both(tmp_path, make, data, **options):
    """Losses of training on images, and on their features without the tower."""
    extract(tmp_path / "features", make(), data, **options)
    on_images = fit(tmp_path / "images", make(), data)
    read = make(load_tower=False)
    batches = {"batch_size": data.batch_size, "val_batch_size": data.val_batch_size}
    on_features = fit(tmp_path / "run", read, features(tmp_path / "features", read, **batches))
    assert not hasattr(read.encoder, "tower")
    return on_images, on_features


@pytest.mark.parametrize("kind", ["slots", "kept"])
@pytest.mark.slow
def test_the_losses_are_those_of_training_on_images(tmp_path, scenes, kind):
    """Bit for bit in fp32, in the same order; masks, statistics, attention and all."""
    model = module(kind)
    wanted, found = both(tmp_path, lambda **o: module(kind, **o), images(scenes, model))
    assert len(wanted.steps) == 12
    assert found.steps == wanted.steps
    assert found.validations == wanted.validations
    assert {"val/fg_ari", "val/coverage_residual"} <= found.validations[0].keys()


@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 2e-3), ("bfloat16", 2e-2)])
@pytest.mark.slow
def test_narrower_features_round(tmp_path, scenes, dtype, rtol):
    model = module("kept")
    data = images(scenes, model)
    wanted, found = both(tmp_path, lambda **o: module("kept", **o), data, dtype=dtype)
    assert found.steps != wanted.steps
    assert found.steps == pytest.approx(wanted.steps, rel=rtol)
    stored = load_file(tmp_path / "features" / "train-00000.safetensors")
    assert str(stored["hidden.2"].dtype) == f"torch.{dtype}"
    assert stored["attention.5.cls"].dtype == torch.float32


@pytest.mark.parametrize("layout", ["variable", "joint"])
@pytest.mark.slow
def test_images_of_many_shapes(tmp_path, shapes, layout):
    def make(**options):
        if layout == "variable":
            return module(encoder=QwenEncoder(**QWEN), **options)
        return module(encoder=TiledEncoder("random:tiny", layer=2), **options)

    data = images(shapes, make(), batch_size=2, val_batch_size=3)
    wanted, found = both(tmp_path, make, data, shard_size=4)
    assert len(wanted.steps) == 6
    assert found.steps == pytest.approx(wanted.steps, rel=1e-5)
    for a, b in zip(wanted.validations, found.validations, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.slow
def test_training_resumes_inside_an_epoch(tmp_path, scenes):
    made = module()
    extract(tmp_path / "features", made, images(scenes, made), shard_size=5)

    def run(name, *args, **options):
        model = module(load_tower=False)
        data = features(tmp_path / "features", model, mixed_shards=2)
        return fit(tmp_path / name, model, data, *args, **options).steps

    straight = run("straight")
    assert len(straight) == 12
    assert run("stopped", 4) == straight[:4]
    assert run("resumed", resume=tmp_path / "stopped" / "step=4.ckpt") == straight[4:]


@pytest.mark.slow
def test_pictures_are_drawn_from_the_files_of_the_images(tmp_path, scenes, caplog):
    from ocvtp.training.callbacks import SlotPictures

    model = module()
    copied = tmp_path / "scenes"
    shutil.copytree(scenes, copied)
    data = images(copied, model)
    extract(tmp_path / "features", model, data)
    read = module(load_tower=False)
    pictures = []
    for name, source in (("a", data), ("b", features(tmp_path / "features", read))):
        folder = tmp_path / name
        run = trainer(folder, max_epochs=1, limit_train_batches=1, callbacks=[SlotPictures(2)])
        run.fit(module(load_tower=name == "a"), source)
        pictures.append((folder / "pictures" / "step0000001.png").read_bytes())
    assert pictures[0] == pictures[1]
    shutil.rmtree(copied)
    again = trainer(tmp_path / "c", max_epochs=1, callbacks=[SlotPictures(2)])
    again.fit(read, features(tmp_path / "features", read))
    assert not (tmp_path / "c" / "pictures").exists()
    assert "no pictures of slots are drawn" in caplog.text


# ------------------------------------------------------------------ extraction


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Killed(Exception):
    pass


def killed_after(count, monkeypatch):
    """The tower gives up after so many batches."""
    left = iter(range(count))
    forward = CLIPEncoder.forward

    def counted(self, *args, **kwargs):
        if next(left, None) is None:
            raise Killed
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CLIPEncoder, "forward", counted)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("batches", "shards"), [(0, 0), (4, 1), (6, 2)])
def test_a_killed_extraction_continues_to_the_same_files(
    tmp_path, scenes, monkeypatch, batches, shards
):
    model = module()
    data = images(scenes, model)
    whole = extract(tmp_path / "whole", model, data)
    assert (whole.written, whole.missing) == (4, 0)
    assert whole.images == {"train": 24, "validation": 6}
    with monkeypatch.context() as patch:
        killed_after(3 + batches, patch)  # one image is tried, and one of each split
        with pytest.raises(Killed):
            extract(tmp_path / "killed", model, data)
    there = content(tmp_path / "killed")
    assert "manifest.json" not in there
    assert len(there) == 1 + shards
    with pytest.raises(ValueError, match="holds unfinished features"):
        features(tmp_path / "killed", model).setup("fit")
    report = extract(tmp_path / "killed", model, data)
    assert report.written == 4 - shards
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert extract(tmp_path / "killed", model, data).written == 0


def test_ranks_share_the_files(tmp_path, scenes):
    model = module()
    data = images(scenes, model)
    extract(tmp_path / "one", model, data)
    first = extract(tmp_path / "two", model, data, rank=1, ranks=2)
    assert (first.written, first.missing) == (2, 2)
    assert not (tmp_path / "two" / "manifest.json").exists()
    second = extract(tmp_path / "two", model, data, rank=0, ranks=2)
    assert (second.written, second.missing) == (2, 0)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_other_settings_do_not_continue_a_folder(tmp_path, scenes):
    model = module()
    extract(tmp_path, model, images(scenes, model))
    other = module(encoder=CLIPEncoder("random:tiny", layer=2, seed=1))
    with pytest.raises(ValueError, match=r"tower\.seed is 0 there and 1 here; weights is"):
        extract(tmp_path, other, images(scenes, other))
    with pytest.raises(ValueError, match='dtype is "float32" there and "float16" here'):
        extract(tmp_path, model, images(scenes, model), dtype="float16")
    with pytest.raises(ValueError, match=r"splits\.train\.num_images is 24 there and 9 here"):
        extract(tmp_path, model, images(scenes, model, limit_train=9))


def test_a_disk_that_is_too_small_is_found_out_first(tmp_path, scenes, monkeypatch):
    model = module("kept")
    run = Extraction(model, images(scenes, model), tmp_path / "x", "float16", shard_size=10)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=run.bytes_needed - 1))
    assert run.bytes_missing < run.bytes_needed < 2 * run.bytes_missing
    with pytest.raises(ValueError, match=r"has 1\.\d MB free, and the features need 1\.\d MB"):
        run.run()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["extraction.json"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=run.bytes_needed))
    report = run.run()
    headers = 4 * 2000  # what the estimate leaves out
    assert report.bytes - headers < run.bytes_missing < report.bytes
    assert Extraction(
        model, images(scenes, model), tmp_path / "x", "float16", shard_size=10
    ).bytes_needed == 0  # fmt: skip


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(9):
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(root / f"{number}.png")
    (root / "0.png").write_bytes(b"no image")
    (root / "5.png").write_bytes(b"no image")
    model = module()
    data = FolderDataModule(str(root), batch_size=2, transform=model.encoder.transform)
    with pytest.raises(ValueError, match=r"0\.png cannot be used"):
        extract(tmp_path / "x", model, data)
    data.on_error = "skip"
    report = extract(tmp_path / "x", model, data, shard_size=4)
    assert [text.split(":")[0] for text in report.skipped] == ["0.png", "5.png"]
    read = features(tmp_path / "x", model, batch_size=7)
    read.setup("fit")
    (batch,) = read.train_dataloader()
    assert sorted(batch["image_ids"]) == [1, 2, 3, 4, 6, 7, 8]
    assert not read.has_validation


def test_mirrored_views(tmp_path, scenes):
    """Of the training images alone: what the tower makes of mirrored pixels and masks."""
    model = module()
    data = images(scenes, model, train_instances=True)
    extract(tmp_path, model, data, views="flip")
    read = features(tmp_path, model)
    read.setup("fit")
    for index in (0, 13):
        item, pixels = data.train_set[index], data.train_set[index]["pixel_values"][None]
        for view, shown in ((0, pixels), (1, pixels.flip(-1))):
            found = read.train_set[index, view]
            wanted = model.encoder(shown).hidden[2][0]
            assert_close(found["hidden"][2], wanted, rtol=1e-5, atol=1e-5)
            ids = item["instances"].flip(-1) if view else item["instances"]
            assert torch.equal(found["instances"], ids)
    assert len(read.train_set) == 24
    assert (read.train_set.num_views, read.val_set.num_views) == (2, 1)
    drawn = trainer(tmp_path / "run", max_epochs=1)
    drawn.fit(module(load_tower=False), features(tmp_path, model))
    assert drawn.global_step == 6


def test_crops_are_views_too(tmp_path, scenes):
    """What the tower makes of windows of the images, mirrored too; and their masks."""
    model = module()
    data = images(scenes, model, train_instances=True, limit_train=3)
    extract(tmp_path / "x", model, data, views="flip", crops=2)
    assert data.transform is model.encoder.transform
    read = features(tmp_path / "x", model, batch_size=2)
    read.setup("fit")
    assert (read.train_set.num_views, read.val_set.num_views) == (6, 1)
    names = read.manifest.settings["views"]
    assert names[:2] == ["plain", "flip"]
    assert all(name.endswith("0.75") for name in names[2:])
    path = data.train_set[1]["path"]
    photo, transform = Image.open(path).convert("RGB"), model.encoder.transform
    left, top = (int(96 * float(part)) for part in names[4].split()[1:3])
    pixels = transform(photo.crop((left, top, left + 72, top + 72)))[None]
    for view, shown in ((4, pixels), (5, pixels.flip(-1))):
        found = read.train_set[1, view]["hidden"][2]
        assert_close(found, model.encoder(shown).hidden[2][0], rtol=1e-4, atol=1e-4)
    whole, window = (read.train_set[1, view]["instances"] for view in (0, 4))
    assert window.shape == whole.shape
    assert not torch.equal(window, whole)
    assert torch.equal(read.train_set[1, 5]["instances"], window.flip(-1))
    plain = tmp_path / "plain"
    extract(plain, model, data)
    stored = load_file(plain / "train-00000.safetensors")["hidden.2"].unflatten(0, (3, -1))
    assert_close(read.train_set[1, 0]["hidden"][2], stored[1], rtol=1e-4, atol=1e-4)


def test_values_that_do_not_fit_the_dtype_are_an_error(tmp_path, scenes, monkeypatch):
    model = module()
    forward = CLIPEncoder.forward

    def larger(self, *args, **kwargs):
        return forward(self, *args, **kwargs).map(lambda values: values * 1e6)

    monkeypatch.setattr(CLIPEncoder, "forward", larger)
    with pytest.raises(ValueError, match=r"hidden\.2 reaches .* which float16 cannot hold"):
        extract(tmp_path / "x", model, images(scenes, model), dtype="float16")
    extract(tmp_path / "y", model, images(scenes, model), dtype="bfloat16")

    def damaged(self, *args, **kwargs):
        return forward(self, *args, **kwargs).map(lambda values: values / 0)

    monkeypatch.setattr(CLIPEncoder, "forward", damaged)
    with pytest.raises(ValueError, match=r"the tower gives hidden\.2 that is not finite"):
        extract(tmp_path / "z", model, images(scenes, model), dtype="float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'; pass one of float16"),
        ({"views": "crop"}, "views='crop'; pass one of plain, flip"),
        ({"crops": -1}, "crops=-1; pass 0 or more"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"rank": 2, "ranks": 2}, "pass a rank from 0"),
    ],
)
def test_arguments_out_of_range(tmp_path, scenes, options, message):
    model = module()
    with pytest.raises(ValueError, match=message):
        extract(tmp_path / "x", model, images(scenes, model), **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_what_cannot_be_extracted(tmp_path, scenes, shapes):
    apart = module(encoder=TiledEncoder("random:tiny", layer=2, slots="per_tile"))
    with pytest.raises(ValueError, match="layout 'per_tile'"):
        extract(tmp_path / "x", apart, images(shapes, apart))
    joint = module(encoder=TiledEncoder("random:tiny", layer=2))
    with pytest.raises(ValueError, match="flip and --crops are of images of one grid"):
        extract(tmp_path / "x", joint, images(shapes, joint), views="flip")
    model = module()
    with pytest.raises(ValueError, match="FeatureDataModule, which has no images"):
        extract(tmp_path / "x", model, features(tmp_path, model))
    unread = module(load_tower=False)
    with pytest.raises(ValueError, match="load_tower=True"):
        extract(tmp_path / "x", unread, images(scenes, unread))


# ------------------------------------------------------------------ what is read of it


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"encoder": CLIPEncoder("random:tiny", layer=3)}, ["hidden_states[3] is not there (but"]),
        ({"kind": "kept"}, ["hidden_states[5]", "attention[5, cls] is not there (but none)"]),
        ({"encoder": CLIPEncoder("random:tiny", layer=2, seed=3)}, ["seed is 0 there and 3 here"]),
        (
            {"encoder": CLIPEncoder("random:tiny", layer=2, dtype="bfloat16")},
            ['dtype is "float32" there and "bfloat16" here'],
        ),
    ],
)
def test_features_of_something_else_are_refused(tmp_path, scenes, settings, messages):
    made = module()
    extract(tmp_path / "x", made, images(scenes, made))
    model = module(**settings, load_tower=False)
    with pytest.raises(ValueError, match="are not those that this training reads") as caught:
        fit(tmp_path / "run", model, features(tmp_path / "x", model))
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.slow
def test_the_commands_extract_train_and_export(tmp_path, scenes, capsys):
    """With the settings of `train`; the artifact is that of training on the images."""
    path = settings_file(tmp_path, scenes, limit_val_batches=1)
    words = ["--config", str(path), "--trainer.accelerator", "cpu"]
    folder = str(tmp_path / "features")
    flags = ["--output", folder, "--dtype", "float32", "--shard-size", "7"]
    before = ["--max-pixels", str(most_pixels())]
    for rank in ("0", "1"):
        assert main([*before, "extract", *words, *flags, "--rank", rank, "--ranks", "2"]) == 0
    said = capsys.readouterr()
    assert "are still to be written" in said.err
    on_features = ["--data", "ocvtp.data.features.FeatureDataModule", "--data.root", folder]
    again = shlex.split(said.out.split("train on them with:")[1])
    assert again == ["ocvtp", *before, "train", *words, *on_features]
    artifacts = []
    for name, more in (("images", []), ("features", on_features)):
        output = str(tmp_path / name)
        assert main(["train", *words, *more, "--output", output]) == 0
        checkpoint = f"{output}/checkpoints/last.ckpt"
        artifacts.append(tmp_path / f"artifact-{name}")
        assert main(["export", "--checkpoint", checkpoint, "--output", str(artifacts[-1])]) == 0
    a, b = (json.loads((folder / "config.json").read_text()) for folder in artifacts)
    assert [one["training"].pop("data")["class"] for one in (a, b)] == [
        "CocoDataModule",
        "FeatureDataModule",
    ]
    assert a == b
    a, b = (load_file(folder / "model.safetensors") for folder in artifacts)
    assert_close(a, b, rtol=0, atol=0)
    rows = list(csv.DictReader((tmp_path / "features/csv/version_0/metrics.csv").open()))
    assert any(row["val/fg_ari"] for row in rows)
    config = yaml.safe_load((tmp_path / "features/csv/version_0/config.yaml").read_text())
    assert config["model"]["load_tower"] is False
    assert main(["train", *words, *on_features, "--model.encoder.layer", "2"]) == 2
    assert "hidden_states[2] is not there (but 3)" in capsys.readouterr().err


def test_the_command_refuses_what_does_not_go_together(tmp_path, scenes, capsys):
    path = str(settings_file(tmp_path, scenes))
    flags = ["extract", "--config", path, "--output", str(tmp_path / "x")]
    assert main([*flags, "--rank", "1"]) == 2
    assert "--rank and --ranks belong together" in capsys.readouterr().err
    data = ["--data", "ocvtp.data.features.FeatureDataModule", "--data.root", "x"]
    assert main([*flags, *data]) == 2
    assert "which has no images" in capsys.readouterr().err
    assert main(["extract", "--config", "no-such", "--output", "x"]) == 2
    assert not Path(tmp_path / "x").exists()
