"""`last.ckpt`: when it is written, and how signals and errors end a run."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from ocvtp.training.figures import gathered
from ocvtp.training.lifecycle import Interrupted
from ocvtp.training.signals import Signals

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keeping:
    """When `last.ckpt` is written, besides at the end of every epoch and of the run.

    Args:
        every_minutes: so often; None leaves it to the epochs.
        every_steps: after so many steps.

    Raises:
        ValueError: for numbers that are not above 0.
    """

    every_minutes: float | None = 30.0
    every_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("every_minutes", "every_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"last.{name}={value}; pass a number above 0, or null.")


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt`, of a moment that can be continued exactly, and answers signals.

    It is written at the end of every epoch and of the run, validated or not, every so many minutes
    and steps, at an error, and at a signal: Ctrl-C, SIGTERM and SIGUSR1 end a run after a step.
    Where a validation follows the step, the run ends after it, so that the run that continues it
    misses none. A second signal ends it at once. Under SLURM, SIGUSR1 puts the job back into the
    queue, and the same command goes on from there. The last of all callbacks, so that what the
    others keep is saved too.

    Args:
        checkpoint: whose folder `last.ckpt` goes to.
        signals: that end the run.
        keeping: when.
        keeps: whether it is written at all, but for signals.

    Attributes:
        saved: the checkpoint written at a signal.
        requeued: whether SLURM was asked to run the job again.
    """

    def __init__(
        self,
        checkpoint: ModelCheckpoint,
        signals: Signals,
        keeping: Keeping = Keeping(),
        keeps: bool = True,
    ) -> None:
        self._checkpoint, self._keeping, self._keeps = checkpoint, keeping, keeps
        self._signals = signals
        self._first = self._last = 0
        self._due = False
        self._written_at = time.monotonic()
        self._exact: dict[str, Any] | None = None
        self.saved: str | None = None
        self.requeued = False

    @property
    def steps(self) -> int:
        """Taken by this run, without those of the one that it continues."""
        return self._last - self._first

    # --------------------------------------------------------------- hooks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = self._last = trainer.global_step
        self._signals.told = trainer.is_global_zero
        self._written_at = time.monotonic()
        self._signals.listen()
        self._signals.waits = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write or end here, if a checkpoint of this moment can be continued exactly."""
        stepped = trainer.global_step > self._last  # no gradients wait to be accumulated
        self._last = trainer.global_step
        data = trainer.datamodule
        self._exact = data.state_dict() if stepped and data is not None else None
        steps = self._keeping.every_steps
        self._due |= stepped and steps is not None and trainer.global_step % steps == 0
        asked, due = self._agreed(trainer)
        self._due = due
        if (asked or due) and stepped and not _validation_follows(trainer, batch_idx):
            if asked:
                self._end(trainer)
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same, where a validation came first."""
        if self._agreed(trainer)[0] and trainer.global_step < trainer.estimated_stepping_batches:
            self._end(trainer)
        if self.steps and self._keeps:
            self._save(trainer)

    def on_train_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Write `last.ckpt` of the last step; what SLURM would go on from has served its time."""
        self._signals.waits = False
        if self.steps and self._keeps:
            self._save(trainer)
        if trainer.is_global_zero:
            for left in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"):
                left.unlink()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write `last.ckpt` of the last whole step, for whoever mends what went wrong."""
        interrupted = isinstance(exception, Interrupted | KeyboardInterrupt)
        if interrupted or not self._signals.waits or not self._keeps or not self.steps:
            return
        self._signals.waits = False
        try:
            path = self._save_whole_step(trainer, pl_module)
        except Exception as error:  # the first error counts
            _LOG.warning("last.ckpt could not be written: %s", error)
            return
        if path is not None:
            _LOG.warning("%s is of step %d; --resume last goes on from there", path, self._last)

    # ----------------------------------------------------------- decisions

    def _agreed(self, trainer: Any) -> tuple[bool, bool]:
        """Whether the run shall end, and whether `last.ckpt` is due; the same in every process."""
        minutes = self._keeping.every_minutes
        late = minutes is not None and time.monotonic() - self._written_at >= 60 * minutes
        asked, due = self._signals.number is not None, self._keeps and (self._due or late)
        if trainer.world_size == 1:
            return asked, due
        if not trainer.strategy.reduce_boolean_decision(asked or due, all=False):
            return False, False
        told = gathered((self._signals.number, due))
        asking = max((number for number, _ in told if number is not None), default=None)
        self._signals.number = asking
        return asking is not None, any(is_due for _, is_due in told)

    def _end(self, trainer: Any) -> None:
        if not trainer.fast_dev_run:
            self.saved = self._save(trainer)
            self._leave_for_slurm(trainer)
        raise Interrupted

    def _leave_for_slurm(self, trainer: Any) -> None:
        """What the job goes on from if SLURM runs it again, which it does for the one signal."""
        environment = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        number = self._signals.number
        if number == (environment.requeue_signal or signal.SIGUSR1):
            trainer._signal_connector._slurm_sigusr_handler_fn(number, None)
            trainer.strategy.barrier()  # a task that ends may end the others, which must have asked
            self.requeued = True
        elif number == signal.SIGTERM:  # preempted, perhaps
            path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
            trainer.save_checkpoint(path)

    # -------------------------------------------------------------- saving

    def _path(self, trainer: pl.Trainer) -> str:
        path = str(Path(self._checkpoint.dirpath or ".") / "last.ckpt")
        if trainer.is_global_zero and Path(path).is_symlink():  # to another checkpoint, which stays
            Path(path).unlink()
        self._checkpoint.last_model_path = path  # part of what is saved
        return path

    def _save(self, trainer: pl.Trainer) -> str:
        path = self._path(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        self._due, self._written_at = False, time.monotonic()
        return path

    def _save_whole_step(self, trainer: Any, module: pl.LightningModule) -> str | None:
        """Of this process alone, as others may have ended; None where it would not be exact."""
        plain = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if self._exact is None or not plain or not trainer.is_global_zero:
            return None
        if not all(bool(p.isfinite().all()) for p in module.parameters() if p.requires_grad):
            return None
        path = self._path(trainer)
        with torch.no_grad():
            content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        content[type(trainer.datamodule).__qualname__] = self._exact
        loop = content["loops"]["fit_loop"]
        if "combined_loader" in loop["state_dict"]:
            loop["state_dict"]["combined_loader"] = [self._exact]
        _without_the_step(loop["epoch_loop.batch_progress"])
        trainer.strategy.checkpoint_io.save_checkpoint(content, path)
        return path


def _without_the_step(progress: dict[str, Any]) -> None:
    """Forget the batch that was begun and not ended."""
    for counts in (progress["total"], progress["current"]):
        counts["ready"] = counts["started"] = counts["processed"] = counts["completed"]


def _validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    every = trainer.val_check_batch
    if trainer.check_val_every_n_epoch is None:  # batches of all epochs are counted
        batch_idx = trainer.fit_loop.epoch_loop.total_batch_idx
    due = every is not None and every != float("inf") and (batch_idx + 1) % every == 0
    return due or trainer.is_last_batch
