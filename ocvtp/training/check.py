"""`ocvtp train --check`: a few steps of a run, and what the whole of it would take."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelSummary, ProgressBar

from ocvtp.training.averaging import NetworkAverage
from ocvtp.training.base import NetworkModule
from ocvtp.training.lifecycle import Interrupted
from ocvtp.training.pace import Pace, memory_gb
from ocvtp.training.schedule import planned_steps

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
        images: training images, or questions. validated: of the validation.
        steps: of the whole run. images_per_s: in training, of all devices.
        data_wait: share of the time between steps that passed until their images were there.
        memory_gb: the most of one device, or of this process without a GPU; of which total there
            are, where that is known.
        start_s: until the first step. hours: of the whole run, with its validations.
        disk_gb: of its checkpoints. free_gb: on the disk where they go.
        loss: of the last step that was tried.
        is_main: whether this process is the first of its run, the one that prints.
    """

    device: str
    images: int
    validated: int
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
            f"on {self.device}: {self.images} training and {self.validated} validation images",
            f"{self.images_per_s:.1f} images/s, {self.data_wait:.0%} of the time waiting for data;"
            f" {self.memory_gb:.1f}{room} GB of memory; loss {self.loss:.4g}",
            f"{self.steps} steps take about {self.hours:.2g} hours, after {self.start_s:.0f} s of"
            " start",
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


class _Probe(Pace):
    """Ends a run after a few steps.

    Attributes:
        start_s: until the first step. seconds: of a batch after the first ones.
        found: see `Pace.figures`. loss: of the last one.
        planned: steps of the whole run; 0 before one was taken. batches: of the whole run. epoch:
            batches of one.
    """

    planned = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._asked = time.monotonic()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.start_s = self._started - self._asked
        if batch_idx <= _WARM:  # the last of these counts: an epoch may have no more
            self._began = self._started
            self._images = self._waited = self._worked = 0.0
        self._ended = time.monotonic()
        self._worked += self._ended - self._started
        self._images += pl_module.count(batch) * trainer.world_size
        self.loss = float("nan") if outputs is None else float(outputs["loss"])
        done = max(1, batch_idx - _WARM + 1)
        ends = done >= _STEPS or self._ended - self._began > _SECONDS
        self.epoch = int(trainer.num_training_batches)
        ends |= batch_idx + 1 >= min(self.epoch, planned_steps(trainer))
        if trainer.world_size > 1:
            ends = trainer.strategy.reduce_boolean_decision(ends, all=False)
        if ends:
            self.planned = planned_steps(trainer)
            self.batches = self.planned * trainer.accumulate_grad_batches
            self.seconds = (self._waited + self._worked) / done
            self.found = self.figures(trainer)
            raise Interrupted


def check(trainer: Any, module: NetworkModule, data: Any, output: str) -> Check:
    """Open the data, train and validate on a few batches, and keep nothing.

    Args:
        trainer: of the run. module: its network. data: its images.
        output: folder that the run would write to.

    Raises:
        ValueError: for a run without a step.
    """
    probe = _Probe()
    stay = (ProgressBar, ModelSummary, NetworkAverage)
    trainer.callbacks = [probe, *(one for one in trainer.callbacks if isinstance(one, stay))]
    trainer.loggers, trainer.num_sanity_val_steps = [], 0
    validates = trainer.limit_val_batches and getattr(data, "has_validation", True)
    with suppress(Interrupted):
        trainer.fit(module, data)
    if not probe.planned:
        raise ValueError(
            f"such a run takes no step (max_epochs={trainer.max_epochs},"
            f" max_steps={trainer.max_steps}, limit_train_batches={trainer.limit_train_batches});"
            " pass more of them."
        )
    validated, seconds = 0, 0.0
    if validates:
        loader = data.val_dataloader()
        batches = min(len(loader), _VALIDATED)
        trainer.limit_val_batches = batches
        began = time.monotonic()
        trainer.validate(module, data, verbose=False)
        seconds = (time.monotonic() - began) / batches * len(loader)
        validated = len(loader.dataset)
    epochs = probe.batches / probe.epoch / (trainer.check_val_every_n_epoch or 1)
    size = sum(p.numel() * p.element_size() for p in module.trained())
    averages = any(isinstance(one, NetworkAverage) for one in trainer.callbacks)
    folder = Path(output).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    return Check(
        device=f"{trainer.world_size} x {torch.cuda.get_device_name() if on_gpu else device}",
        images=len(data.train_set),
        validated=validated,
        steps=probe.planned,
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


def _total_memory() -> float:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9
