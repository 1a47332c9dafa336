"""Training: the module, resuming, two processes, bf16, unreadable images."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.testing import assert_close

from ocvtp.data.module import CocoDataModule
from ocvtp.data.scenes import write_scenes
from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.export import export_checkpoint
from ocvtp.slots.config import NetworkSizes
from ocvtp.slots.decoder import DecoderConfig
from ocvtp.slots.objectives import SlotsObjective
from ocvtp.training.module import OCPrunerModule
from ocvtp.training.run import train
from ocvtp.training.schedule import warmup_cosine

SIZES = NetworkSizes(hidden_dim=32, slot_dim=16, ffn_dim=32, noise_rows=64)
DECODER = DecoderConfig(num_layers=1, num_heads=2, ffn_dim=64)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, num_train=24, num_val=6, size=96, seed=0)
    return root


def module(**settings):
    encoder = CLIPEncoder("random:tiny", layer=2)
    settings = {"network": SIZES, "num_slots": [4, 8], "val_num_slots": 6} | settings
    return OCPrunerModule(encoder, settings.pop("objective", SlotsObjective(DECODER)), **settings)


def data(root, model, **settings):
    settings = {"batch_size": 4} | settings
    return CocoDataModule(root=str(root), transform=model.encoder.transform, **settings)


def trainer(folder, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = quiet | {"accelerator": "cpu", "num_sanity_val_steps": 0} | settings
    settings.setdefault("callbacks", [])
    return pl.Trainer(default_root_dir=folder, gradient_clip_val=1.0, **settings)


def checkpoints(folder, **settings):
    defaults = {"monitor": "val/loss", "filename": "best", "save_last": True}
    return ModelCheckpoint(dirpath=folder, **{**defaults, **settings})


def weights(model):
    return {k: v.clone() for k, v in model.network.state_dict().items()}


class Kill(pl.Callback):
    """Ends the process's run in the middle, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise InterruptedError


def fit(folder, scenes, stop=None, resume=None):
    """Three epochs of six steps, killed before step `stop`; a checkpoint after every step."""
    model = module()
    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer(folder, max_epochs=3, callbacks=[saver, Kill(stop)])
    try:
        run.fit(model, data(scenes, model), ckpt_path=resume, weights_only=True)
    except InterruptedError:
        assert run.global_step == stop
    return model, run


@pytest.mark.slow
def test_a_resumed_run_continues_bit_for_bit(tmp_path, scenes):
    straight, run = fit(tmp_path / "straight", scenes)
    assert run.global_step == 18
    for stop in (4, 6, 7):  # inside an epoch of 6 steps, at its end, just after
        stopped = tmp_path / f"stopped{stop}"
        fit(stopped, scenes, stop)
        resumed, run = fit(tmp_path / f"{stop}", scenes, resume=stopped / f"step={stop}.ckpt")
        assert run.global_step == 18
        assert_close(weights(resumed), weights(straight), rtol=0, atol=0)


@pytest.mark.slow
def test_runs_with_the_same_seed_are_the_same(tmp_path, scenes):
    one, _ = fit(tmp_path / "one", scenes, 3)
    torch.manual_seed(99)  # what happened before does not matter
    two, _ = fit(tmp_path / "two", scenes, 3)
    assert_close(weights(one), weights(two), rtol=0, atol=0)


def test_the_checkpoint_holds_the_network_alone_in_plain_types(tmp_path, scenes):
    model = module()
    saver = checkpoints(tmp_path)
    run = trainer(tmp_path, max_epochs=1, callbacks=[saver])
    run.fit(model, data(scenes, model))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(k.startswith("network.") for k in content["state_dict"])
    exported = export_checkpoint(tmp_path / "best.ckpt", tmp_path / "out")
    config = exported.config
    assert (config.tower, config.layer, config.grid_hw) == ("random:tiny", 2, (12, 12))
    assert config.num_slots == (4, 8)
    assert config.preprocessing["size"] == {"shortest_edge": 96}
    assert config.training["steps"] == 6
    assert config.training["images"] == 24
    assert config.training["validation"]["num_slots"] == 6
    for name, value in exported.state_dict().items():
        assert_close(value, model.network.state_dict()[name], rtol=0, atol=0)
    whole = export_checkpoint(tmp_path / "best.ckpt", tmp_path / "whole", with_decoder=True)
    assert whole.decoder is not None


def test_validation_is_repeatable_and_complete(tmp_path, scenes):
    model = module()
    run = trainer(tmp_path)
    first = run.validate(model, data(scenes, model), verbose=False)[0]
    second = run.validate(model, data(scenes, model, val_batch_size=3), verbose=False)[0]
    names = {"loss", "relative_mse", "slots_in_use", "unique_tokens", "coverage_distance"}
    names |= {"coverage_residual", "fg_ari", "mbo_i"}
    assert first.keys() == {f"val/{name}" for name in names}
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-4), name


def test_without_annotations_there_are_no_mask_metrics(tmp_path, scenes):
    model = module()
    folders = data(scenes, model, train_annotations=None, val_annotations=None)
    result = trainer(tmp_path).validate(model, folders, verbose=False)[0]
    assert "val/loss" in result
    assert "val/fg_ari" not in result


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["masked_transformer", "mlp"])
def test_the_loss_falls(tmp_path, scenes, decoder):
    config = DecoderConfig(kind=decoder, num_layers=1, num_heads=2, ffn_dim=64)
    model = module(objective=SlotsObjective(config), lr=3e-3)
    run = trainer(tmp_path, max_epochs=4)
    before = run.validate(model, data(scenes, model), verbose=False)[0]["val/loss"]
    run.fit(model, data(scenes, model))
    after = run.validate(model, data(scenes, model), verbose=False)[0]["val/loss"]
    assert after < 0.8 * before


def test_bf16(tmp_path, scenes):
    model = module()
    run = trainer(tmp_path, max_steps=2, precision="bf16-mixed", limit_val_batches=1)
    run.fit(model, data(scenes, model))
    assert run.global_step == 2
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.network.parameters())


@pytest.fixture
def damaged(tmp_path, scenes):
    return damage(scenes, tmp_path / "damaged")


def damage(scenes, root):
    """A copy with one image of each split that cannot be read."""
    shutil.copytree(scenes, root)
    for folder in ("train2017", "val2017"):
        victim = sorted((root / folder).iterdir())[1]
        victim.write_bytes(victim.read_bytes()[:300])
    return root


def test_an_unreadable_image_is_named(tmp_path, damaged):
    model = module()
    with pytest.raises(ValueError, match="000000000002"):
        trainer(tmp_path, max_epochs=1).fit(model, data(damaged, model))


@pytest.mark.slow
def test_skipped_images_are_named_and_counted(tmp_path, damaged, caplog):
    model = module()
    run = trainer(tmp_path, max_epochs=1, logger=pl.loggers.CSVLogger(tmp_path, name="csv"))
    run.fit(model, data(damaged, model, on_error="skip", batch_size=1))
    assert run.fit_loop.epoch_loop.total_batch_idx == 23  # the batch without images is skipped
    assert sum("000000000002" in message for message in caplog.messages) == 2  # train and val
    assert model._bad_images == 2


def test_schedule():
    factors = [warmup_cosine(step, 10, 100, 1e-5) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[100] == pytest.approx(1e-5)
    assert all(b < a for a, b in zip(factors[10:-1], factors[11:], strict=True))
    assert warmup_cosine(0, 0, 10, 0.0) == 1.0


def test_slot_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="145 slots for 144 tokens"):
        module(num_slots=[8, 145])


def settings_file(folder: Path, scenes: Path, **trainer_settings) -> Path:
    """A YAML file as a user would write it."""
    content = yaml.safe_load(Path("configs/train/coco_folder.yaml").read_text())
    content["data"]["init_args"] = {"root": str(scenes), "batch_size": 4}
    content["model"]["network"] = {"hidden_dim": 32, "slot_dim": 16, "ffn_dim": 32}
    content["trainer"] |= {"max_epochs": 1, "default_root_dir": str(folder)} | trainer_settings
    csv_logger = {"class_path": "pytorch_lightning.loggers.CSVLogger"}
    csv_logger["init_args"] = {"save_dir": str(folder), "name": "csv"}
    content["trainer"]["logger"] = [csv_logger]
    content["checkpoint"]["dirpath"] = str(folder / "checkpoints")
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_the_command_trains_and_resumes(tmp_path, scenes):
    path = settings_file(tmp_path, scenes)
    result = train(["--config", str(path)])
    assert Path(result.best).name == "best.ckpt"
    assert Path(result.last).name == "last.ckpt"
    assert list(tmp_path.glob("csv/version_0/pictures/*.png"))
    assert (tmp_path / "csv/version_0/config.yaml").is_file()
    rows = list(csv.DictReader(open(tmp_path / "csv/version_0/metrics.csv")))
    assert {"train/loss", "val/loss", "lr-AdamW", "val/fg_ari"} <= rows[0].keys()
    more = train(["--config", str(path), "--resume", result.last, "--trainer.max_epochs", "2"])
    assert torch.load(more.last, weights_only=True)["global_step"] == 12


@pytest.mark.slow
def test_a_second_run_sets_the_first_ones_checkpoints_aside(tmp_path, scenes, caplog):
    path = settings_file(tmp_path, scenes, limit_train_batches=1, limit_val_batches=1)
    first = Path(train(["--config", str(path)]).best)
    content = first.read_bytes()
    train(["--config", str(path), "--model.seed", "1"])
    assert (tmp_path / "checkpoints.1" / "best.ckpt").read_bytes() == content
    assert first.read_bytes() != content
    assert any("checkpoints.1" in message for message in caplog.messages)


@pytest.mark.slow
def test_training_without_validation_images(tmp_path, scenes):
    path = settings_file(tmp_path, scenes)
    words = ["--config", str(path), "--data.val_images", "null", "--data.val_annotations", "null"]
    result = train(words)
    assert result.best_score is None
    assert torch.load(result.best, weights_only=True)["global_step"] == 6


def test_wrong_settings_name_what_is_wrong(tmp_path, scenes, capsys):
    path = settings_file(tmp_path, scenes)
    with pytest.raises(SystemExit):
        train(["--config", str(path), "--model.objectiv.power", "1"])
    assert "objectiv" in capsys.readouterr().err
