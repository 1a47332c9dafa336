"""How fast a run is, what it waits for, what it needs, and when it will be done."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch

from ocvtp.training.schedule import planned_steps, steps_done

_SHOWN = ("images_per_s", "data_wait")
"""On the bar, which says itself what is left."""


class Pace(pl.Callback):
    """Logs the speed of a run where its losses go; some of it is on the bar too.

    - `run/images_per_s`: of all devices, since the last one logged; questions of a selector;
    - `run/data_wait`: share of the time between steps that passed until their images were there;
    - `run/memory_gb`: most of it so far, of the GPU, or of this process without one;
    - `run/hours_left`: of the whole run, its validations with it.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._began, self._first = time.monotonic(), steps_done(trainer)
        self._ended: float | None = None
        self._images = self._waited = self._worked = 0.0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.monotonic()
        if self._ended is not None:
            self._waited += self._started - self._ended

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ended = time.monotonic()
        self._worked += self._ended - self._started
        self._images += pl_module.count(batch) * trainer.world_size
        if trainer._logger_connector.should_update_logs:
            for name, value in self.figures(trainer).items():
                pl_module.log(f"run/{name}", value, prog_bar=name in _SHOWN, batch_size=1)
            self._images = self._waited = self._worked = 0.0
            self._ended = time.monotonic()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._ended = None  # no data was waited for

    def figures(self, trainer: pl.Trainer) -> dict[str, float]:
        """Those of the steps since the last ones, by their names."""
        seconds = max(self._waited + self._worked, 1e-9)
        found = {"images_per_s": self._images / seconds, "data_wait": self._waited / seconds}
        return found | {"memory_gb": memory_gb(), "hours_left": self._hours_left(trainer)}

    def _hours_left(self, trainer: pl.Trainer) -> float:
        done, total = steps_done(trainer), planned_steps(trainer)
        each = (time.monotonic() - self._began) / max(done - self._first, 1e-9)
        return max(0.0, total - done) * each / 3600


def memory_gb() -> float:
    """The most that this process had so far: of the GPU, or of the machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
