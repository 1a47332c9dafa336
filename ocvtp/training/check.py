"""`ocvtp train --check`: a few steps of a run, and what the whole of it would take."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.data import sized_len
from pytorch_lightning.callbacks import ModelSummary, ProgressBar
from pytorch_lightning.utilities import CombinedLoader

from ocvtp.reporting.plain_text import duration
from ocvtp.training.averaging import NetworkAverage
from ocvtp.training.base import NetworkModule
from ocvtp.training.errors import restoring
from ocvtp.training.lifecycle import Interrupted, LateStart
from ocvtp.training.pace import Pace, memory_gb
from ocvtp.training.schedule import planned_steps
from ocvtp.training.signals import Signals

_WARM = 2  # first steps, which are slower
_STEPS, _SECONDS = 20, 30.0  # measured after them, whichever comes first
_VALIDATED = 2  # batches
_CHECKPOINTS = 2  # best.ckpt and last.ckpt
_OF_WEIGHTS = 3  # the weights, and AdamW's two means of each


@dataclass(frozen=True)
class Check:
    """What a run would take.

    Args:
        device: what it ran on, and how many of them.
        images: training images, or questions; None where the data does not say how many.
        validated: of the validation.
        steps: of the run, without those before the checkpoint that it goes on from.
        images_per_s: in training, of all devices.
        data_wait: share of the time between steps that passed until their images were there.
        memory_gb: the most of one device, or of this process without a GPU; of which total there
            are, where that is known.
        start_s: until the first step. hours: of the whole run, with its validations.
        disk_gb: of its checkpoints. free_gb: on the disk where they go.
        loss: of the last step that was tried.
        is_main: whether this process is the first of its run, the one that prints.
    """

    device: str
    images: int | None
    validated: int | None
    steps: int
    images_per_s: float
    data_wait: float
    memory_gb: float
    total_memory_gb: float | None
    start_s: float
    hours: float
    disk_gb: float
    free_gb: float
    loss: float
    is_main: bool = True

    def lines(self) -> list[str]:
        """For people."""
        room = f" of {self.total_memory_gb:.0f}" if self.total_memory_gb else ""
        lines = [
            f"on {self.device}: {_told(self.images)} training and {_told(self.validated)}"
            " validation images",
            f"{self.images_per_s:.1f} images/s, {self.data_wait:.0%} of the time waiting for data;"
            f" {self.memory_gb:.1f}{room} GB of memory; loss {self.loss:.4g}",
            f"{self.steps} steps take about {duration(3600 * self.hours)}, after"
            f" {duration(self.start_s)} of start",
            f"checkpoints take {self.disk_gb:.2g} GB of {self.free_gb:.0f} GB free",
        ]
        if self.data_wait > 0.3:
            lines.append(
                "the data is too slow for the device: raise --data.num_workers, make the images"
                " smaller once (`ocvtp resize`), or store features (`ocvtp extract`)"
            )
        if self.disk_gb > self.free_gb:
            lines.append("the disk is too small for them: pass another --output")
        return lines


def _told(count: int | None) -> str:
    return "?" if count is None else str(count)


class _Enough(Interrupted):
    """What is to be known is known."""


class _Probe(Pace):
    """Ends a run after a few steps.

    Args:
        signals: that may end it earlier.

    Attributes:
        start_s: until the first step. seconds: of a batch after the first ones.
        found: see `Pace.figures`. loss: of the last one. images: to train on, see `_count`.
        left: steps of the run, without those before its checkpoint; 0 before one was taken.
        batches: likewise. epoch: batches of one.
    """

    left = 0

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._number = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._asked = time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._signals.listen()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_start(trainer, pl_module)
        self._signals.listen()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number, self._number = self._number, self._number + 1
        if number == 0:
            self.start_s = self._started - self._asked
        if number <= _WARM:  # the last of these counts: an epoch may have no more
            self._began = self._started
            self._images = self._waited = self._worked = 0.0
        self._ended = time.monotonic()
        self._worked += self._ended - self._started
        self._images += pl_module.count(batch) * trainer.world_size
        self.loss = float("nan") if outputs is None else float(outputs["loss"])
        done = max(1, number - _WARM + 1)
        ends = done >= _STEPS or self._ended - self._began > _SECONDS
        self.epoch = int(trainer.num_training_batches)
        left = math.ceil(planned_steps(trainer) - self._first)
        ends |= batch_idx + 1 >= self.epoch or number + 1 >= left
        if trainer.world_size > 1:
            ends = trainer.strategy.reduce_boolean_decision(ends, all=False)
        if ends:
            self.left = left
            self.images = _count(trainer.train_dataloader)
            self.batches = left * trainer.accumulate_grad_batches
            self.seconds = (self._waited + self._worked) / done
            self.found = self.figures(trainer)
            raise _Enough


def check(
    trainer: Any,
    module: NetworkModule,
    data: Any,
    output: str,
    signals: Signals,
    resume: str | None = None,
) -> Check:
    """Open the data, train and validate on a few batches, and keep nothing.

    Args:
        trainer: of the run. module: its network. data: its images.
        output: folder that the run would write to.
        signals: that end it; they are listened to.
        resume: checkpoint that the run would go on from.

    Raises:
        ValueError: for a run without a step, and a checkpoint that cannot be continued.
        Interrupted: at a signal.
    """
    probe = _Probe(signals)
    stay = (ProgressBar, ModelSummary, NetworkAverage)
    trainer.loggers, trainer.num_sanity_val_steps = [], 0
    start = LateStart(trainer, None)
    trainer.callbacks = [
        start, probe, *(one for one in trainer.callbacks if isinstance(one, stay))
    ]  # fmt: skip
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # of others
    with suppress(_Enough), restoring(resume, start):
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    if not probe.left:
        which = f" after step {trainer.global_step} of {resume}" if resume else ""
        raise ValueError(
            f"such a run takes no step{which} (max_epochs={trainer.max_epochs},"
            f" max_steps={trainer.max_steps}, limit_train_batches={trainer.limit_train_batches});"
            " pass more of them."
        )
    validated, seconds = _validation(trainer, module, data)
    epochs = probe.batches / probe.epoch / (trainer.check_val_every_n_epoch or 1)
    size = sum(p.numel() * p.element_size() for p in module.trained())
    averages = any(isinstance(one, NetworkAverage) for one in trainer.callbacks)
    folder = Path(output).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    return Check(
        device=f"{trainer.world_size} x {torch.cuda.get_device_name() if on_gpu else device}",
        images=probe.images,
        validated=validated,
        steps=probe.left,
        images_per_s=probe.found["images_per_s"],
        data_wait=probe.found["data_wait"],
        memory_gb=memory_gb(),
        total_memory_gb=_total_memory() if on_gpu else None,
        start_s=probe.start_s,
        hours=(probe.batches * probe.seconds + epochs * seconds) / 3600,
        disk_gb=size * _CHECKPOINTS * (_OF_WEIGHTS + averages) / 1e9,
        free_gb=shutil.disk_usage(there).free / 1e9,
        loss=probe.loss,
        is_main=trainer.is_global_zero,
    )


def _validation(trainer: Any, module: NetworkModule, data: Any) -> tuple[int | None, float]:
    """Items of a whole validation, see `_count`, and its seconds, from a few batches of it."""
    if not trainer.enable_validation or not getattr(data, "has_validation", True):
        return 0, 0.0
    trainer.limit_val_batches = _VALIDATED
    began = time.monotonic()
    trainer.validate(module, data, verbose=False)
    seconds = time.monotonic() - began
    loaders = CombinedLoader(trainer.val_dataloaders).flattened
    tried = trainer.num_val_batches
    whole = [sized_len(one) or few for one, few in zip(loaders, tried, strict=True)]
    return _count(loaders), seconds * sum(whole) / max(sum(tried), 1)


def _count(loaders: Any) -> int | None:
    """Items of one loader, or of several in any collection; None where one has no length."""
    sizes = [sized_len(getattr(one, "dataset", None)) for one in CombinedLoader(loaders).flattened]
    return None if None in sizes else sum(filter(None, sizes))


def _total_memory() -> float:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9
