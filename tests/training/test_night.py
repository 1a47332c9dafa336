"""A run that nobody watches: errors, signals, SLURM, averages, compiled networks, its pace."""

from __future__ import annotations

import csv
import logging
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import EMAWeightAveraging, TQDMProgressBar
from test_training import checkpoints, data, module, scenes, settings_file, trainer
from torch.testing import assert_close

from ocvtp.cli import main
from ocvtp.data.coco import collate
from ocvtp.training.check import check as check_run
from ocvtp.training.last import Keeping
from ocvtp.training.lifecycle import Interrupted, WholeCheckpoints
from ocvtp.training.module import OCPrunerModule
from ocvtp.training.run import TrainingStopped, build, check, train
from ocvtp.training.signals import Signals

__all__ = ["scenes"]

QUICK = {"limit_val_batches": 1, "enable_progress_bar": False, "enable_model_summary": False}


def quick(folder: Path, scenes: Path, **settings) -> list[str]:
    """The words of a run of two epochs of six steps."""
    folder.mkdir(exist_ok=True)
    settings = {"max_epochs": 2, **QUICK, **settings}
    return ["--config", str(settings_file(folder, scenes, **settings))]


def content(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, scenes):
    """The weights of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    train(quick(folder, scenes))
    return content(folder)["state_dict"]


@pytest.fixture
def in_step(monkeypatch):
    """Does something in the middle of one step, and in no other run."""
    step = OCPrunerModule.training_step

    def at(number, act):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == number:
                monkeypatch.setattr(OCPrunerModule, "training_step", step)
                act(batch)
            return step(self, batch, batch_idx)

        monkeypatch.setattr(OCPrunerModule, "training_step", training_step)

    return at


# ------------------------------------------------------------------- errors


def _fail(batch):
    raise RuntimeError("the device is gone")


def _spoil(batch):
    batch["pixel_values"][1] = float("nan")


@pytest.mark.slow
@pytest.mark.parametrize("at", [6, 8])  # the first step of an epoch, and one inside
def test_an_error_leaves_the_last_whole_step(tmp_path, scenes, in_step, straight, at, caplog):
    words = quick(tmp_path, scenes)
    in_step(at, _fail)
    with pytest.raises(RuntimeError, match="is gone"):
        train(words)
    assert content(tmp_path)["global_step"] == at
    assert f"last.ckpt is of step {at}; --resume last goes on" in caplog.text
    train([*words, "--resume", "last"])
    assert_close(content(tmp_path)["state_dict"], straight, rtol=0, atol=0)


@pytest.mark.slow
def test_features_that_are_not_finite_are_named_and_spoil_nothing(tmp_path, scenes, in_step):
    words = quick(tmp_path, scenes)
    in_step(3, _spoil)
    with pytest.raises(ValueError, match=r"at step 3 what is read of \S*\d{12}.jpg is not finite"):
        train(words)
    kept = content(tmp_path)
    assert kept["global_step"] == 3
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_a_loss_that_is_not_finite_is_another_error():
    model = module()
    trainer(".").strategy.connect(model)
    model._trainer = trainer(".")
    features, names = torch.zeros(9, 4, 3), [f"{i}.jpg" for i in range(9)]
    nan = torch.tensor(float("nan"))
    model.refuse_nan(torch.tensor(1.0), [features, None], names)
    with pytest.raises(ValueError, match=r"the loss is nan on 0.jpg, .* and 1 more, .*Lower --mod"):
        model.refuse_nan(nan, [features], names)
    features[[3, 5]] = nan
    with pytest.raises(ValueError, match=r"what is read of 3.jpg, 5.jpg is not finite"):
        model.refuse_nan(nan, [features], names)


# ------------------------------------------------------------------ last.ckpt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (["--last.every_steps", "4"], [4, 6, 8, 12, 12]),  # and each epoch, and the run's end
        (["--last.every_minutes", "1e-9"], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12]),
        (["--checkpoint.save_last", "false", "--last.every_steps", "4"], []),
    ],
)
def test_when_last_is_written(tmp_path, scenes, monkeypatch, more, steps):
    written = []
    save = OCPrunerModule.on_save_checkpoint

    def spied(self, checkpoint):
        written.append(self.trainer.global_step)
        save(self, checkpoint)

    monkeypatch.setattr(OCPrunerModule, "on_save_checkpoint", spied)
    train([*quick(tmp_path, scenes), "--checkpoint.every_n_epochs", "9", *more])
    assert written == steps


def test_a_checkpoint_replaces_the_one_before_when_it_is_whole(tmp_path, monkeypatch):
    path, left = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.0.tmp"
    left.touch()  # of a run that was killed
    WholeCheckpoints().save_checkpoint({"step": 1}, path)
    assert list(tmp_path.iterdir()) == [path]

    def killed(self, target):
        assert torch.load(self) == {"step": 2}  # beside it, on the same disk
        raise InterruptedError

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(InterruptedError):
        WholeCheckpoints().save_checkpoint({"step": 2}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.load(path) == {"step": 1}


def test_keeping_refuses_what_is_no_time():
    assert Keeping(None, None).every_minutes is None
    with pytest.raises(ValueError, match=r"last.every_minutes=0; pass a number above 0"):
        Keeping(0)
    with pytest.raises(ValueError, match=r"last.every_steps=-1"):
        Keeping(every_steps=-1)


# ------------------------------------------------------------------- signals


def _signal(number):
    return lambda batch: os.kill(os.getpid(), number)


@pytest.mark.slow
def test_sigusr1_ends_a_run_with_the_command_that_goes_on(tmp_path, scenes, in_step, capsys):
    words = quick(tmp_path, scenes)
    in_step(2, _signal(signal.SIGUSR1))
    assert main(["train", *words]) == 128 + signal.SIGUSR1
    assert f"--resume {tmp_path}/checkpoints/last.ckpt" in capsys.readouterr().err
    assert content(tmp_path)["global_step"] == 3


def test_a_signal_is_no_second_one_where_another_process_was_sent_the_first():
    signals = Signals()
    with signals.listening():
        signals.waits, signals.told = True, False
        signals.number = signal.SIGTERM  # as all processes agreed
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.number == signal.SIGTERM
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.number == signal.SIGUSR1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_runs_a_job_again(tmp_path, scenes, in_step, straight, monkeypatch, caplog, number):
    """The same command goes on from the step, in the same folder, and leaves nothing behind."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = {"NTASKS": "1", "JOB_NAME": "night", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0"}
    for name, value in (job | {"NODEID": "0", "NTASKS_PER_NODE": "1"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    words = quick(tmp_path, scenes)
    in_step(5, _signal(number))  # the last step of an epoch: its validation comes first
    with pytest.raises(TrainingStopped) as stopped:
        train(words)
    requeued = number == signal.SIGUSR1
    assert ("SLURM runs the job again" in str(stopped.value)) == requeued
    assert (tmp_path / "asked").exists() == requeued
    assert not requeued or (tmp_path / "asked").read_text() == "requeue 7\n"
    assert (tmp_path / "hpc_ckpt_1.ckpt").is_file()
    if requeued:  # once more, where the node failed meanwhile
        in_step(8, _fail)
        with pytest.raises(RuntimeError, match="is gone"):
            train(words)
        caplog.clear()
    result = train(words)
    if requeued:
        assert f"the job goes on from {tmp_path}/checkpoints/last.ckpt" in caplog.text
    assert_close(content(tmp_path)["state_dict"], straight, rtol=0, atol=0)
    assert not list(tmp_path.glob("hpc_ckpt_*"))
    assert not (tmp_path / "checkpoints.1").exists()
    assert Path(result.best).is_file()
    validated = [
        row["step"]
        for log in sorted(tmp_path.glob("csv/version_*/metrics.csv"))
        for row in csv.DictReader(log.open())
        if row["val/loss"]
    ]
    assert validated == ["5", "11"]


# ------------------------------------------------------------------ settings


@pytest.mark.slow
def test_a_moving_average_is_kept_and_continued(tmp_path, scenes):
    words = [*quick(tmp_path / "a", scenes), "--ema", "0.9"]
    train(words)
    whole = content(tmp_path / "a", "best")
    assert whole["state_dict"].keys() == whole["current_model_state"].keys()
    assert all(name.startswith("network.") for name in whole["state_dict"])
    name = "network.encode.1.weight"
    assert not torch.equal(whole["state_dict"][name], whole["current_model_state"][name])
    words = [*quick(tmp_path / "b", scenes), "--ema", "0.9"]
    build(words)
    train([*words, "--trainer.max_steps", "6"])
    with pytest.raises(ValueError, match="ema is None, there 0.9"):
        train([*words[:2], "--resume", "last"])
    with pytest.raises(ValueError, match="ema=2.0; pass a number between 0 and 1"):
        build([*words, "--ema", "2"])


@pytest.mark.slow
@pytest.mark.parametrize("config", ["coco", "surprise"])
def test_a_compiled_network_is_the_same_network(tmp_path, scenes, config):
    """Every step runs in graphs: few of them, whatever the budgets."""
    figures = []
    words = quick(tmp_path, scenes, log_every_n_steps=1, max_epochs=1)
    if config == "surprise":
        settings = yaml.safe_load(Path(words[1]).read_text())
        del settings["model"]["objective"]
        sizes = {"class_path": "ocvtp.surprise.network.SurpriseSizes"}
        settings["model"]["network"] = sizes | {"init_args": {"hidden_dim": 16}}
        Path(words[1]).write_text(yaml.safe_dump(settings))
    for number, backend in enumerate([None, "eager"]):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        more = [] if backend is None else ["--compile", backend]
        train([*words, *more])
        rows = csv.DictReader(open(tmp_path / f"csv/version_{number}/metrics.csv"))
        figures.append([float(row["train/loss"]) for row in rows if row["train/loss"]])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs > 0) == (backend is not None)
        assert graphs <= 24
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    with pytest.raises(ValueError, match="compile='inductr' is unknown; pass one of .*inductor"):
        build([*words, "--compile", "inductr"])


@pytest.mark.slow
def test_tf32_is_a_setting_of_the_run_alone(tmp_path, scenes, in_step):
    seen = []
    in_step(0, lambda batch: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    train([*quick(tmp_path, scenes, max_epochs=1), "--matmul_precision", "high"])
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_half_precision_are_refused(tmp_path, scenes, precision):
    run, model = trainer(tmp_path, max_steps=1, precision=precision), module()
    with pytest.raises(ValueError, match=f"precision={precision} keeps the weights .*bf16-mixed"):
        run.fit(model, data(scenes, model))


# --------------------------------------------------------------------- pace


@pytest.mark.slow
def test_pace_is_logged(tmp_path, scenes):
    train(quick(tmp_path, scenes, log_every_n_steps=3))
    rows = list(csv.DictReader(open(tmp_path / "csv/version_0/metrics.csv")))
    logged = [row for row in rows if row["run/images_per_s"]]
    assert [row["step"] for row in logged] == ["2", "5", "8", "11"]
    assert all(0 <= float(row["run/data_wait"]) < 1 for row in logged)
    assert all(float(row["run/memory_gb"]) > 0.1 for row in logged)
    left = [float(row["run/hours_left"]) for row in logged]
    assert left[0] > left[-1] == 0


@pytest.mark.slow
def test_a_log_gets_lines_of_the_whole_run(tmp_path, scenes, capsys, monkeypatch):
    monkeypatch.setattr("ocvtp.reporting.progress._SECONDS", 0.0)
    monkeypatch.setattr("ocvtp.training.progress._SECONDS", 0.0)
    words = quick(tmp_path, scenes, enable_progress_bar=True)
    train(words)
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "epoch" in line]
    assert "train/loss" not in said.out
    assert any(re.match(r"5/12, [\d.]+ s left  epoch 1  train/loss \d", x) for x in lines)
    assert any("epoch 1, validation batch 1" in line for line in lines)
    assert re.match(r"12/12  epoch 2  train/loss \d.*val/loss \d", lines[-1])
    train([*words, "--resume", "last", "--trainer.max_epochs", "3"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "/18" in line]
    assert re.match("12/18.*  epoch 3", lines[0])  # before the first step of it
    assert lines[-1].startswith("18/18")


@pytest.mark.slow
def test_a_bar_of_the_settings_stands_alone(tmp_path, scenes):
    own = {"class_path": "pytorch_lightning.callbacks.TQDMProgressBar"}
    for callbacks in (own, [own]):
        words = quick(tmp_path, scenes, enable_progress_bar=True, callbacks=callbacks)
        assert isinstance(build(words).trainer.progress_bar_callback, TQDMProgressBar)
    assert build(quick(tmp_path, scenes)).trainer.progress_bar_callback is None


@pytest.mark.slow
def test_check_tries_a_run_and_keeps_nothing(tmp_path, scenes, capsys):
    words = quick(tmp_path / "run", scenes, max_epochs=100)
    found = check(words)
    assert (found.images, found.validated, found.steps) == (24, 6, 600)
    assert found.images_per_s > 0
    assert 0 < found.hours < 10
    assert found.disk_gb == pytest.approx(6e-9 * 4 * _learnt(words), rel=1e-6)
    assert main(["train", *words, "--check"]) == 0
    said = capsys.readouterr().out
    assert "on 1 x cpu: 24 training and 6 validation images" in said
    assert re.search(r"600 steps take about ([\d.]+ (h|min|s) ?)+, after [\d.]+ s of start", said)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings.yaml"]


@pytest.mark.slow
def test_check_refuses_a_run_without_a_step(tmp_path, scenes, capsys):
    assert main(["train", *quick(tmp_path / "run", scenes, max_epochs=0), "--check"]) == 2
    assert "such a run takes no step (max_epochs=0, max_steps=-1" in capsys.readouterr().err


@pytest.mark.slow
def test_check_goes_on_from_a_checkpoint(tmp_path, scenes, capsys):
    words = quick(tmp_path / "run", scenes, max_steps=4)
    last = train(words).last
    before = sorted(path.stat().st_mtime_ns for path in Path(last).parent.iterdir())
    more = [*words, "--trainer.max_steps", "10", "--resume", "last"]
    assert check(more).steps == 6
    assert main(["train", *words, "--check", "--resume", last]) == 2
    assert f"takes no step after step 4 of {last}" in capsys.readouterr().err
    assert main(["train", *more, "--check", "--model.lr", "0.5"]) == 2
    assert "is of a run with other settings: model.lr" in capsys.readouterr().err
    assert main(["train", *words, "--check", "--resume", "no.ckpt"]) == 2
    assert "--resume no.ckpt does not exist" in capsys.readouterr().err
    assert before == sorted(path.stat().st_mtime_ns for path in Path(last).parent.iterdir())


class Plain(pl.LightningDataModule):
    """Images of somebody else, in loaders of Lightning's own forms."""

    def __init__(self, own: pl.LightningDataModule) -> None:
        super().__init__()
        self.own = own

    def setup(self, stage: str) -> None:
        self.own.setup(stage)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.own.train_set, 4, collate_fn=collate)


class Validated(Plain):
    """With two loaders for the validation."""

    def val_dataloader(self) -> Any:
        return [torch.utils.data.DataLoader(self.own.val_set, 3, collate_fn=collate)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "validated"), [(Plain, 0), (Validated, 12)])
def test_check_takes_the_data_of_others(tmp_path, scenes, monkeypatch, kind, validated):
    model = module()
    monkeypatch.setattr(model, "validation_step", lambda batch, batch_idx, dataloader_idx=0: None)
    run, images = trainer(tmp_path, max_steps=3), kind(data(scenes, model))
    found = check_run(run, model, images, str(tmp_path), Signals())
    assert (found.images, found.validated, found.steps) == (24, validated, 3)
    assert f"24 training and {validated} validation images" in found.lines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_check(tmp_path, scenes, in_step, number, capsys):
    before = signal.getsignal(number)
    in_step(1, lambda batch: os.kill(os.getpid(), number))
    assert main(["train", *quick(tmp_path / "run", scenes), "--check"]) == 128 + number
    assert signal.getsignal(number) == before
    assert capsys.readouterr().err.splitlines()[-1] == "ocvtp: stopped; a check keeps nothing"


def _learnt(words):
    return sum(p.numel() for p in build(words).model.trained())


def test_collapsed_slots_and_large_steps_are_told_once(caplog):
    model = module(num_slots=[64], val_num_slots=64)
    model._trainer = trainer(".")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model.look_at({"slots_in_use": 0.05, "unique_tokens": 3.0})
        model.look_at({"slots_in_use": 0.3, "unique_tokens": 30.0})
    said = [record.message for record in caplog.records if record.name.startswith("ocvtp")]
    assert len(said) == 2
    assert "only 5% of the slots win a token" in said[0]
    assert "64 slots want 3.0 different tokens" in said[1]


@pytest.mark.parametrize(
    ("images", "settings", "said"),
    [(96, {}, "a step sees 96 images, 8 times those"), (48, {}, ""), (96, {"lr": 3e-3}, "")],
)
def test_many_images_a_step_at_the_usual_rate_are_told(caplog, images, settings, said):
    model = module(**settings)
    model._trainer = trainer(".", accumulate_grad_batches=2)
    model.trainer.datamodule = data(".", model, batch_size=images // 2)
    model._warn_of_large_steps()
    found = [record.message for record in caplog.records if record.name.startswith("ocvtp")]
    assert len(found) == bool(said)
    assert not said or found[0].startswith(said)
    assert not said or "up to 0.0028" in found[0]


@pytest.mark.slow
def test_averages_of_lightning_hold_the_network_alone_too(tmp_path, scenes):
    """The callback copies the whole module; its checkpoint is continued."""

    def fit(epochs, resume=None):
        model = module()
        saver = checkpoints(tmp_path, monitor=None, save_top_k=0)
        average = EMAWeightAveraging(decay=0.9)
        run = trainer(tmp_path, max_epochs=epochs, callbacks=[average, saver], limit_val_batches=0)
        run.fit(model, data(scenes, model), ckpt_path=resume, weights_only=True)
        return torch.load(tmp_path / "last.ckpt", weights_only=True)

    kept = fit(1)
    assert all(name.startswith("network.") for name in kept["state_dict"])
    assert fit(2, tmp_path / "last.ckpt")["global_step"] == 12
