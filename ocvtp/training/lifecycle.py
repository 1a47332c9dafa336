"""When a run touches its folder, and how it writes checkpoints there."""

from __future__ import annotations

import logging
import os
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.cli import SaveConfigCallback

from ocvtp.reporting.files import remove_unfinished, write_whole

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


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and renames it: the one before it stays until then.

    Lightning writes it to the system's folder of temporary files. On another disk it is then copied
    over the one before it, and lost with it if the disk is full or the process is killed.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """See `CheckpointIO.save_checkpoint`.

        Raises:
            OSError: if it cannot be written.
        """
        del storage_options
        file = Path(path)
        remove_unfinished(file)
        content = BytesIO()
        torch.save(checkpoint, content)
        write_whole(file, content.getbuffer())


def write_whole_checkpoints(trainer: Any) -> None:
    """Let a trainer write them so, unless its settings name another way."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()


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

    Attributes:
        opened: whether the data is open. started: whether training began.
    """

    def __init__(self, trainer: pl.Trainer, set_aside: Path | None) -> None:
        self._loggers, trainer.loggers = trainer.loggers, []
        self._set_aside = set_aside
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
