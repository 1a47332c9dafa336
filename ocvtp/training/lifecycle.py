"""When a run touches its folder, and how it is stopped."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.cli import SaveConfigCallback

_LOG = logging.getLogger(__name__)


class Interrupted(BaseException):
    """Ends a run at a signal. No KeyboardInterrupt: at that, Lightning would leave the process."""


def refuse_unwritable(folder: Path) -> None:
    """Find out before hours are spent, and without making the folder.

    Raises:
        ValueError: if it cannot be made, or written to.
    """
    there = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )
    if not there.is_dir() or not os.access(there, os.W_OK):
        which = "may not be written" if there.is_dir() else "is no folder"
        raise ValueError(f"{folder} cannot be written, as {there} {which}; pass another --output.")


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` when training starts, and not before the data opened."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class LateStart(pl.Callback):
    """Leaves the run's folder alone for as long as the run may fail to start.

    Loggers make their folders when everything is built and restored; an earlier run's checkpoints
    are renamed when the first step was taken. The first of all callbacks.

    Args:
        trainer: the one whose loggers wait.
        set_aside: folder of checkpoints that must not be overwritten; None if they may.
        resumes: whether a checkpoint is continued that was asked for.

    Attributes:
        opened: whether the data is open. started: whether training began.
    """

    def __init__(self, trainer: pl.Trainer, set_aside: Path | None, resumes: bool) -> None:
        self._loggers, trainer.loggers = trainer.loggers, []
        self._set_aside, self._resumes = set_aside, resumes
        self.opened = self.started = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The data is open: it comes before the callbacks."""
        trainer.loggers = self._loggers
        self.opened = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is built and restored."""
        self.started = True
        for logger in trainer.loggers:
            getattr(logger, "experiment", None)  # makes its folder
        if trainer.global_step and not self._resumes:  # requeued by SLURM: they are its own
            self._set_aside = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A run that never started has nothing to log; some loggers would still make folders."""
        if not self.started:
            trainer.loggers = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """The first step went well."""
        if self._set_aside is not None and not trainer.fast_dev_run:
            if trainer.is_global_zero:
                _rename(self._set_aside)
            trainer.strategy.barrier()
        self._set_aside = None


def _rename(folder: Path) -> None:
    if any(folder.glob("*.ckpt")):
        names = (folder.with_name(f"{folder.name}.{i}") for i in count(1))
        free = next(name for name in names if not name.exists())
        folder.rename(free)
        _LOG.warning("an earlier run's checkpoints are now in %s", free)


class CleanStop(Checkpoint):
    """Ctrl-C and SIGTERM end a run after a step, with `last.ckpt` written.

    The last of all callbacks, so that what the others keep is saved too. Where a validation follows
    the step, the run ends after the epoch, so that the run that continues it misses none. A second
    signal ends it at once. A run that ends by itself leaves `last.ckpt` of its last step, whether a
    validation followed or not.

    Args:
        checkpoint: whose folder `last.ckpt` goes to.

    Attributes:
        signal: the one that asked for the end, or None. saved: the checkpoint written then.
    """

    def __init__(self, checkpoint: ModelCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._process = os.getpid()
        self._waits = False
        self._first = self._last = 0
        self._main = True
        self.signal: int | None = None
        self.saved: str | None = None

    @property
    def steps(self) -> int:
        """Taken by this run, without those of the one that it continues."""
        return self._last - self._first

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Answer the signals while the block runs."""
        before = {number: signal.getsignal(number) for number in self._signals()}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signals(self) -> tuple[signal.Signals, ...]:
        if threading.current_thread() is not threading.main_thread():
            return ()  # only the main thread can
        # SLURM sends SIGTERM to jobs that it puts back into the queue.
        return (signal.SIGINT,) if SLURMEnvironment.detect() else (signal.SIGINT, signal.SIGTERM)

    def _listen(self) -> None:
        for number in self._signals():
            signal.signal(number, self._answer)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that loads data: the main one ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        again, self.signal = self.signal is not None, number
        if again or not self._waits:
            raise Interrupted
        if self._main:
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = self._last = trainer.global_step
        self._main = trainer.is_global_zero
        self._listen()  # Lightning has put its own answer to SIGTERM there
        self._waits = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End here, if asked to, and if a checkpoint of this moment can be continued exactly."""
        stepped = trainer.global_step > self._last  # no gradients wait to be accumulated
        self._last = trainer.global_step
        if self._asked(trainer) and stepped and not _validation_follows(trainer, batch_idx):
            self._end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same, where a validation came first."""
        if self._asked(trainer) and trainer.global_step < trainer.estimated_stepping_batches:
            self._end(trainer)

    def on_train_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Write `last.ckpt` of the last step, validated or not."""
        self._waits = False
        if self.steps and self._checkpoint.save_last:
            self._save(trainer)

    def _asked(self, trainer: pl.Trainer) -> bool:
        asked = self.signal is not None
        if trainer.world_size > 1:  # all of them, at the same step
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        return asked

    def _end(self, trainer: Any) -> None:
        if not trainer.fast_dev_run:
            self.saved = self._save(trainer)
        raise Interrupted

    def _save(self, trainer: pl.Trainer) -> str:
        path = str(Path(self._checkpoint.dirpath or ".") / "last.ckpt")
        if trainer.is_global_zero and Path(path).is_symlink():  # to another checkpoint, which stays
            Path(path).unlink()
        self._checkpoint.last_model_path = path  # part of what is saved
        trainer.save_checkpoint(path, weights_only=False)
        return path


def _validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    every = trainer.val_check_batch
    if trainer.check_val_every_n_epoch is None:  # batches of all epochs are counted
        batch_idx = trainer.fit_loop.epoch_loop.total_batch_idx
    due = every is not None and every != float("inf") and (batch_idx + 1) % every == 0
    return due or trainer.is_last_batch
