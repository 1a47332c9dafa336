"""What a training run trains and how far it is, on a terminal or in a log."""

from __future__ import annotations

import time
from typing import Any

from pytorch_lightning.callbacks import ModelSummary, ProgressBar
from pytorch_lightning.utilities import rank_zero_info
from rich.progress import Progress, TaskID
from torch import nn

from ocvtp.reporting.progress import progress_bar
from ocvtp.training.schedule import epochs_done, is_at_an_end, planned_steps, steps_done

_SECONDS = 0.5
"""Between two looks at the figures, which wait for the device."""


class RunProgress(ProgressBar):
    """Steps done of the whole run, the time left and the latest figures, see `progress_bar`."""

    def __init__(self) -> None:
        super().__init__()
        self._is_on = True
        self._progress: Progress | None = None
        self._bar = TaskID(0)
        self._looked = 0.0

    def disable(self) -> None:
        """Show nothing: in processes other than the first."""
        self._is_on = False

    def enable(self) -> None:
        """Show it again."""
        self._is_on = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The next epoch is that of the first step, where a checkpoint ended one."""
        self._begin()
        next_epoch = epochs_done(trainer)[0] + is_at_an_end(trainer)
        self._show(trainer, total=planned_steps(trainer), epoch=next_epoch)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self._is_due():
            self._show(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._is_due():
            self._show(trainer, f", validation batch {batch_idx + 1}")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._show(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._show(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()

    def _begin(self) -> None:
        if self._is_on and self._progress is None:
            self._progress = progress_bar("{task.fields[figures]}")
            self._bar = self._progress.add_task("", total=None, figures="")
            self._progress.start()

    def _end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _is_due(self) -> bool:
        return time.monotonic() - self._looked >= _SECONDS

    def _show(
        self, trainer: Any, doing: str = "", total: int | None = None, epoch: int | None = None
    ) -> None:
        if self._progress is None:
            return
        if epoch is None:
            epoch = epochs_done(trainer)[0]
        self._looked = time.monotonic()
        figures = trainer.progress_bar_metrics
        self._progress.update(
            self._bar,
            total=total,
            completed=steps_done(trainer),
            description=f"epoch {epoch + 1}{doing}",
            figures=", ".join(f"{name} {value:.4g}" for name, value in figures.items()),
        )


class ParameterCounts(ModelSummary):
    """One line: how many parameters are trained, and of what. Lightning's table goes to stdout."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        parts = [
            f"{name} {trained:,} of {total:,}"
            for name, child in pl_module.named_children()
            if (total := _parameters(child))
            for trained in [_parameters(child, trained=True)]
        ]
        rank_zero_info(f"trained parameters: {', '.join(parts)}")


def _parameters(module: nn.Module, trained: bool = False) -> int:
    return sum(one.numel() for one in module.parameters() if one.requires_grad or not trained)
