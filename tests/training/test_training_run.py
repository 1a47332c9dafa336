"""A training run from start to end: its seed, its folder, its start, its stop."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from fresh_process import RUN, TRAINS, in_two_processes, outputs
from pytorch_lightning.callbacks.model_checkpoint import warning_cache
from test_training import checkpoints, damaged, data, module, scenes, settings_file, trainer
from torch.testing import assert_close

from ocvtp.cli import main
from ocvtp.commands.train import run_words
from ocvtp.export import export_checkpoint
from ocvtp.images import most_pixels
from ocvtp.reporting.folder_lock import claimed
from ocvtp.training.module import OCPrunerModule
from ocvtp.training.run import TrainingResult, TrainingStopped, build, train

pytestmark = pytest.mark.slow

__all__ = ["damaged", "scenes"]

QUICK = {"limit_val_batches": 1, "enable_progress_bar": False, "enable_model_summary": False}


def quick(folder: Path, scenes: Path, **settings) -> list[str]:
    """The words of a run of one epoch of six steps."""
    folder.mkdir(exist_ok=True)
    return ["--config", str(settings_file(folder, scenes, **{**QUICK, **settings}))]


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "settings.yaml"}


def content(checkpoint: str | Path) -> dict:
    return torch.load(checkpoint, weights_only=True)


def weights(checkpoint: str | Path) -> dict:
    return content(checkpoint)["state_dict"]


# ---------------------------------------------------------------- the seed


def test_one_seed_sets_everything(tmp_path, scenes):
    """Weights, noise, order of the images, and what the artifact says."""
    orders = []
    for seed in ("0", "1", "1"):
        folder = tmp_path / str(len(orders))
        words = [*quick(folder, scenes), "--seed_everything", seed]
        found = content(train(words).last)
        assert found["ocvtp"]["training"]["seed"] == int(seed)
        assert found["CocoDataModule"]["seed"] == int(seed)
        orders.append(found["state_dict"])
        config = yaml.safe_load((folder / "csv/version_0/config.yaml").read_text())
        seeds = (config["model"]["seed"], config["data"]["init_args"]["seed"])
        assert (config["seed_everything"], *seeds) == (int(seed),) * 3
    assert not torch.equal(
        orders[0]["network.encode.1.weight"], orders[1]["network.encode.1.weight"]
    )
    assert_close(orders[1], orders[2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("file", "words", "wanted"),
    [
        ({"seed_everything": 3}, [], 3),
        ({"seed_everything": None, "model": 4}, [], 4),
        ({"seed_everything": None, "data": 5}, [], 5),
        ({"seed_everything": 2, "model": 2, "data": 2}, ["--seed_everything", "6"], 6),
        ({"seed_everything": 2, "model": 2, "data": 2}, ["--model.seed=7"], 7),
        ({"seed_everything": 2, "model": 1}, ["--data.seed", "8"], 8),
        ({"seed_everything": 2}, ["--seed_everything", "9", "--model.seed", "9"], 9),
        ({"seed_everything": False, "model": 3}, [], 3),
        ({"seed_everything": None}, [], 0),
        ({"seed_everything": 2, "model": 1}, [], "seed_everything=2, model.seed=1 are one setting"),
        ({"seed_everything": 0, "data": 1}, [], "seed_everything=0, data.seed=1 are one setting"),
        ({}, ["--model.seed", "1", "--data.seed", "2"], "model.seed=1, data.seed=2 are one"),
        ({}, ["--seed_everything=-1"], "pass 0 to 4294967295"),
    ],
)
def test_the_names_of_the_seed(tmp_path, scenes, file, words, wanted):
    """The command line counts before files; two names of one place must agree."""
    path = settings_file(tmp_path, scenes)
    settings = yaml.safe_load(path.read_text())
    settings["seed_everything"] = file.get("seed_everything", 0)
    if settings["seed_everything"] is None:
        del settings["seed_everything"]
    if "model" in file:
        settings["model"]["seed"] = file["model"]
    if "data" in file:
        settings["data"]["init_args"]["seed"] = file["data"]
    path.write_text(yaml.safe_dump(settings))
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            build(["--config", str(path), *words])
        return
    cli = build(["--config", str(path), *words])
    assert (cli.model.seed, cli.datamodule.seed) == (wanted, wanted)
    assert cli.config.seed_everything in (wanted, False)


# -------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("flag", "style"),
    [
        ("--output", "short"),
        ("--trainer.default_root_dir", "explicit"),
        ("--output", "folders alone"),
        ("--trainer.default_root_dir", "folders alone"),
    ],
)
def test_one_setting_moves_all_that_a_run_writes(tmp_path, scenes, flag, style):
    """Also where a file names the folders of loggers and checkpoints, as saved ones do."""
    home, away = tmp_path / "home", tmp_path / "away"
    words = quick(home, scenes)
    if style == "short":
        path = Path(words[1])
        settings = yaml.safe_load(path.read_text())
        del settings["trainer"]["logger"], settings["checkpoint"]["dirpath"]
        path.write_text(yaml.safe_dump(settings))
    if style == "folders alone":
        path = Path(words[1])
        settings = yaml.safe_load(path.read_text())
        del settings["trainer"]["default_root_dir"]
        path.write_text(yaml.safe_dump(settings))
    result = train([*words, flag, str(away)])
    assert not files(home)
    assert result.best == str(away / "checkpoints/best.ckpt")
    wanted = {"checkpoints/last.ckpt", "csv/version_0/config.yaml", "csv/version_0/metrics.csv"}
    wanted |= {"csv/version_0/pictures/step0000006.png"}
    wanted |= {"tensorboard/version_0"} if style == "short" else set()
    assert wanted <= files(away)
    again = ["--config", str(away / "csv/version_0/config.yaml")]
    assert build(again).trainer.default_root_dir == str(away)
    assert build([*again, "--output", str(home)]).trainer.loggers[0].save_dir == str(home)


def test_folders_elsewhere_stay_elsewhere(tmp_path, scenes):
    words = quick(tmp_path / "home", scenes)
    words += ["--output", str(tmp_path / "away"), "--checkpoint.dirpath", str(tmp_path / "kept")]
    cli = build(words)
    assert cli.trainer.checkpoint_callback.dirpath == str(tmp_path / "kept")
    assert cli.trainer.loggers[0].save_dir == str(tmp_path / "away")
    with pytest.raises(ValueError, match="are one setting of a run, and disagree; pass --output"):
        build([*words, "--trainer.default_root_dir", str(tmp_path / "third")])


# --------------------------------------------------------------- the start


def failures(scenes):
    """Words that a start fails at, sooner or later, and what is then said."""
    return {
        "no data": (["--data.root", "/no/such/folder"], "/no/such/folder"),
        "batch size": (["--data.batch_size", "999"], "batch_size=999 does not fit"),
        "no validation": (["--data.val_images", "nowhere"], "nowhere"),
        "slots": (["--model.num_slots", "[999]"], "999 slots for 144 tokens"),
        "tower": (["--model.encoder.tower", "random:huge"], "random:huge"),
        "no end": (["--trainer.max_epochs=-1"], "pass --trainer.max_steps N"),
        "sizes": (["--model.network.hidden_dim=-3"], "hidden_dim=-3; pass a whole number"),
        "accelerator": (["--trainer.accelerator", "gpuu"], "gpuu"),
        "devices": (["--trainer.accelerator", "cpu", "--trainer.devices", "none"], "devices"),
        "output": (["--output", __file__], "cannot be written"),
        "resume": (["--resume", "/no/such.ckpt"], "/no/such.ckpt does not exist"),
        "first step": (["--model.objective.objects", "true"], "train_instances"),
    }


@pytest.mark.parametrize("case", failures(None))
def test_a_start_that_fails_leaves_everything_as_it_was(tmp_path, scenes, case, capsys):
    if case == "first step":  # the only one that fails in training
        words = kept_words(tmp_path, scenes)
    else:
        words = quick(tmp_path, scenes)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "best.ckpt").write_text("of an earlier run")
    before = files(tmp_path)
    more, message = failures(scenes)[case]
    assert main(["train", *words, *more]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ocvtp: error: ")
    assert message in error
    assert (folder / "best.ckpt").read_text() == "of an earlier run"
    if case != "first step":  # which may log
        assert files(tmp_path) == before


def kept_words(folder, scenes):
    path = settings_file(folder, scenes, **QUICK)
    settings = yaml.safe_load(path.read_text())
    settings["model"]["objective"] = {"class_path": "ocvtp.slots.kept.KeptObjective"}
    settings["model"]["network"] |= {"choice": "one_to_one", "truncation": "none"}
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


@pytest.mark.slow
def test_an_error_of_a_worker_is_one_line_too(tmp_path, damaged, capsys):
    assert main(["train", *quick(tmp_path, damaged), "--data.num_workers", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ocvtp: error: ")
    assert "000000000002" in error
    assert "Traceback" not in error


def test_two_runs_do_not_write_to_one_folder(tmp_path, scenes, capsys):
    words = quick(tmp_path, scenes, limit_train_batches=1)
    with claimed(tmp_path, "ocvtp train"):
        before = files(tmp_path)
        assert main(["train", *words]) == 2
        assert files(tmp_path) == before
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"ocvtp: error: {tmp_path} is being written to by this process")
    assert main(["train", *words]) == 0
    assert not list(tmp_path.rglob("*.lock"))


def test_the_folder_of_an_earlier_run_is_renamed_at_the_first_step(tmp_path, scenes):
    words = quick(tmp_path, scenes, limit_train_batches=1)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "best.ckpt").write_text("of an earlier run")
    train(words)
    assert (tmp_path / "checkpoints.1/best.ckpt").read_text() == "of an earlier run"
    result = train([*words, "--resume", "last", "--trainer.max_epochs", "2"])
    assert result.last == str(folder / "last.ckpt")
    assert not (tmp_path / "checkpoints.2").exists()  # it is the same run that goes on


def test_a_run_without_loggers(tmp_path, scenes):
    result = train([*quick(tmp_path, scenes), "--trainer.logger", "false"])
    assert Path(result.best).is_file()
    assert {"config.yaml", "pictures", "checkpoints/last.ckpt"} <= files(tmp_path)
    assert not (tmp_path / "csv").exists()


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (["--trainer.max_epochs=-1", "--trainer.max_steps", "4"], 4),
        (["--trainer.max_epochs=-1", "--trainer.max_steps", "8"], 8),
        (["--trainer.limit_train_batches", "2"], 2),
        (["--trainer.accumulate_grad_batches", "4"], 2),
    ],
)
def test_runs_that_end_by_steps_or_time(tmp_path, scenes, more, steps):
    result = train([*quick(tmp_path, scenes), *more])
    assert content(result.last)["global_step"] == steps
    exported = export_checkpoint(result.last, tmp_path / "artifact").config.training
    assert exported["steps"] == steps
    each = 2 if "accumulate" in more[0] or "limit" in more[0] else 6
    assert exported["epochs"] == pytest.approx(steps / each, abs=1e-3)


def test_a_run_that_ends_by_time(tmp_path, scenes):
    words = [*quick(tmp_path, scenes), "--trainer.max_epochs", "2000"]
    result = train([*words, "--trainer.max_time", "00:00:00:02"])
    steps = content(result.last)["global_step"]
    assert 0 < steps < 12000
    assert content(result.last)["ocvtp"]["training"]["epochs"] == pytest.approx(steps / 6, abs=1e-3)
    none = train([*words, "--trainer.max_time", "00:00:00:00"])
    assert none.note.startswith("no step was taken")


def test_a_schedule_needs_an_end(tmp_path, scenes):
    model = module()
    run = trainer(tmp_path, max_epochs=-1, max_time="00:00:10:00")
    with pytest.raises(ValueError, match=r"max_steps=-1\) end this one; pass --trainer.max_steps"):
        run.fit(model, data(scenes, model))


def test_epochs_are_those_that_ran(tmp_path, scenes):
    """At the validation in the middle and at the end of an epoch, and after the last one."""
    model = module()
    saver = checkpoints(tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1)
    run = trainer(tmp_path, max_epochs=2, callbacks=[saver], val_check_interval=0.5)
    run.fit(model, data(scenes, model))
    found = {
        file["ocvtp"]["training"]["steps"]: file["ocvtp"]["training"]["epochs"]
        for file in map(content, tmp_path.glob("step=*.ckpt"))
    }
    assert found == {3: 0.5, 6: 1, 9: 1.5, 12: 2}
    assert all(isinstance(found[step], int) for step in (6, 12))


# ------------------------------------------------------------------ the end


def test_a_finished_run_has_nothing_left_to_train(tmp_path, scenes, capsys):
    words = quick(tmp_path, scenes)
    result = train(words)
    before = files(tmp_path)
    for name in ("last", "best"):
        assert run_words([*words, "--resume", str(tmp_path / f"checkpoints/{name}.ckpt")]) == 0
        said = capsys.readouterr().out
        assert f"nothing was left to train: {tmp_path}/checkpoints/{name}.ckpt is at step 6" in said
        assert "max_epochs=1" in said
        assert f"best checkpoint: {result.best}\n" in said
    assert before <= files(tmp_path)
    assert not (tmp_path / "checkpoints.1").exists()


def test_fast_dev_run_keeps_nothing_and_says_so(tmp_path, scenes, capsys):
    assert run_words([*quick(tmp_path, scenes), "--trainer.fast_dev_run", "true"]) == 0
    said = capsys.readouterr().out
    assert "fast_dev_run tried 1 steps and keeps nothing" in said
    assert "checkpoint:" not in said
    assert not files(tmp_path)


def test_a_run_that_is_never_validated_leaves_its_last_step(tmp_path, scenes, capsys):
    words = quick(tmp_path, scenes, check_val_every_n_epoch=4)
    assert run_words(words) == 0
    said = capsys.readouterr().out
    assert "no validation ran" in said
    assert f"best checkpoint: {tmp_path}/checkpoints/last.ckpt" in said
    assert content(tmp_path / "checkpoints/last.ckpt")["global_step"] == 6
    none = train([*words, "--trainer.limit_val_batches", "0"])
    assert content(none.best)["global_step"] == 6


def test_a_run_that_ends_before_its_validation_says_so_once(tmp_path, scenes, capsys, recwarn):
    """In one line of ours; Lightning would warn of a figure that cannot be there yet."""
    warning_cache.clear()
    assert run_words([*quick(tmp_path, scenes), "--trainer.max_steps", "2"]) == 0
    assert "no validation ran: the best checkpoint is the last one" in capsys.readouterr().out
    assert not [str(one.message) for one in recwarn if "monitored key" in str(one.message)]


def test_no_step_at_all(tmp_path, scenes):
    assert (
        "no step was taken (max_epochs=0"
        in train([*quick(tmp_path, scenes), *("--trainer.max_epochs", "0")]).note
    )


def test_more_epochs_continue_the_last_one_bit_for_bit(tmp_path, scenes, monkeypatch):
    """`last.ckpt` of a run that ended continues as if it had not; the schedule apart."""
    monkeypatch.setattr("ocvtp.training.base.planned_steps", lambda trainer: 18)
    straight = train([*quick(tmp_path / "a", scenes), "--trainer.max_epochs", "3"])
    for epochs in (1, 2):
        words = quick(tmp_path / f"{epochs}", scenes)
        train([*words, "--trainer.max_epochs", str(epochs)])
        more = train([*words, "--resume", "last", "--trainer.max_epochs", "3"])
        assert content(more.last)["global_step"] == 18
        assert_close(weights(more.last), weights(straight.last), rtol=0, atol=0)


# ----------------------------------------------------------------- the stop


@pytest.fixture
def signal_in_step(monkeypatch):
    """Sends a signal to this process in the middle of some steps."""
    step = OCPrunerModule.training_step

    def send(number, *steps):
        left = set(steps)

        def training_step(self, batch, batch_idx):
            if self.trainer.global_step in left:
                left.remove(self.trainer.global_step)
                os.kill(os.getpid(), number)
            return step(self, batch, batch_idx)

        monkeypatch.setattr(OCPrunerModule, "training_step", training_step)
        return lambda: monkeypatch.setattr(OCPrunerModule, "training_step", step)

    return send


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, scenes):
    """A run of two epochs with some words more; each once."""

    @cache
    def run(*more):
        folder = tmp_path_factory.mktemp("undisturbed")
        return train([*quick(folder, scenes), "--trainer.max_epochs", "2", *more])

    return run


@pytest.mark.parametrize(
    ("number", "at", "stops", "more"),
    [
        (signal.SIGINT, 0, 1, []),
        (signal.SIGTERM, 8, 9, []),
        (signal.SIGINT, 5, 6, []),  # the last step of an epoch: after its validation
        (signal.SIGINT, 8, 10, ["--trainer.val_check_interval", "3"]),  # likewise in the middle
        (signal.SIGINT, 1, 2, ["--trainer.accumulate_grad_batches", "2"]),
        (signal.SIGINT, 1, 2, ["--data.num_workers", "1"]),
    ],
)
def test_a_stopped_run_continues_bit_for_bit(
    tmp_path, scenes, undisturbed, signal_in_step, number, at, stops, more
):
    straight = undisturbed(*more)
    words = [*quick(tmp_path / "b", scenes), "--trainer.max_epochs", "2", *more]
    before = signal.getsignal(number)
    calm = signal_in_step(number, at)
    with pytest.raises(TrainingStopped, match=f"stopped after {stops} steps") as stopped:
        train(words)
    assert signal.getsignal(number) == before
    assert stopped.value.exit_status == 128 + number
    last = str(tmp_path / "b/checkpoints/last.ckpt")
    assert stopped.value.checkpoint == last
    assert content(last)["global_step"] == stops
    calm()
    command = shlex.split(str(stopped.value).split("continue with:")[1])
    assert command == ["ocvtp", "train", *words, "--resume", last]
    resumed = train(command[2:])
    assert_close(weights(resumed.last), weights(straight.last), rtol=0, atol=0)
    assert content(resumed.last)["ocvtp"]["training"]["epochs"] == 2
    scores = [r.best_score for r in (resumed, straight)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_the_command_says_how_to_go_on(tmp_path, scenes, signal_in_step, capsys):
    words = quick(tmp_path, scenes)
    signal_in_step(signal.SIGINT, 1, 2)
    before = ["--max-pixels", str(most_pixels())]
    assert main([*before, "train", *words]) == 130
    last = tmp_path / "checkpoints/last.ckpt"
    again = f"ocvtp {' '.join(before)} train --config {words[1]} --resume {last}"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"ocvtp: stopped after 2 steps; continue with:  {again}"
    assert content(last)["ocvtp"]["training"]["epochs"] == 0.333
    assert main(["train", *words, f"--resume={last}"]) == 130  # again, at step 2
    assert f"--config {words[1]} --resume {last}\n" in capsys.readouterr().err


def test_the_command_that_exports_runs_as_it_stands(monkeypatch, capsys):
    best = "my runs/best.ckpt"
    monkeypatch.setattr("ocvtp.training.run.train", lambda words: TrainingResult(best, best, None))
    before = ["--max-pixels", str(most_pixels())]
    assert main([*before, "train", "--seed_everything", "1"]) == 0
    said = capsys.readouterr().out.split("export it with:")[1]
    words = ["export", "--checkpoint", best, "--output", "DIR"]
    assert shlex.split(said) == ["ocvtp", *before, *words]


def test_a_second_signal_stops_at_once(tmp_path, scenes, monkeypatch):
    def training_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(OCPrunerModule, "training_step", training_step)
    with pytest.raises(TrainingStopped, match="before the first step; there is no") as stopped:
        train(quick(tmp_path, scenes))
    assert stopped.value.checkpoint is None


def test_a_second_signal_later_names_the_checkpoint_that_there_is(tmp_path, scenes, monkeypatch):
    step = OCPrunerModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(OCPrunerModule, "training_step", training_step)
    with pytest.raises(TrainingStopped, match="after 8 steps, and saved none of") as stopped:
        train([*quick(tmp_path, scenes), "--trainer.max_epochs", "3"])
    assert content(stopped.value.checkpoint)["global_step"] == 6
    assert stopped.value.exit_status == 130


def test_a_signal_before_training_starts(tmp_path, scenes, monkeypatch):
    monkeypatch.setattr(
        "ocvtp.data.module.CocoDataModule.setup",
        lambda *_, **__: os.kill(os.getpid(), signal.SIGINT),
    )
    with pytest.raises(TrainingStopped, match="before the first step"):
        train(quick(tmp_path, scenes))
    assert not files(tmp_path)


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(tmp_path, scenes):
    """With workers and several processes, all of which a terminal sends the signal.

    Until then a run says what it trains, and libraries do not speak of themselves.
    """
    devices = 2
    words = quick(tmp_path, scenes, devices=devices, accelerator="cpu", enable_model_summary=True)
    words += ["--trainer.max_epochs", "500", "--data.num_workers", "1", "--trainer.strategy", "ddp"]
    log = tmp_path / "csv/version_0/metrics.csv"
    with subprocess.Popen(
        [sys.executable, "train.py", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        for _ in range(1200):
            if log.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        said, error = process.communicate(timeout=120)
    assert process.returncode == 130, error[-3000:]
    assert said == ""
    parameters = r"trained parameters: encoder 0 of [\d,]+, network ([\d,]+) of \1$"
    assert len(re.findall(parameters, error, re.M)) == 1
    for unwanted in ("Traceback", "litlogger", "already configured", "treespec"):
        assert unwanted not in error
    assert error.count("continue with:") == 1
    command = shlex.split(error.split("continue with:")[1].splitlines()[0])
    steps = content(command[-1])["global_step"]
    per_epoch = 6 // devices
    more = [*command[1:], "--trainer.max_epochs", str(steps // per_epoch + 1)]
    outputs([in_two_processes(RUN.format(words=more))], first=TRAINS)
    assert content(command[-1])["global_step"] == (steps // per_epoch + 1) * per_epoch


def test_lightning_is_where_it_was():
    """What the callbacks lean on."""
    run = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    assert run.loggers == []
    assert run.val_check_batch is None
    assert run.is_last_batch is False
