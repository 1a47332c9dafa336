"""What an artifact says of the run that made it."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from ocvtp import __version__
from ocvtp.training.schedule import epochs_done

_MOST = 64  # points of a curve


def training_summary(
    trainer: pl.Trainer, settings: dict[str, Any], val_num_slots: float
) -> dict[str, Any]:
    """Plain values: steps, epochs, images, settings, figures of the validation, versions.

    Args:
        trainer: in or after a run.
        settings: of the module, taken over as they are.
        val_num_slots: slot count, or budget, of the validation.
    """
    data = getattr(trainer, "datamodule", None)
    loader = trainer.train_dataloader
    return {
        "steps": trainer.global_step,
        "epochs": epochs_run(trainer),
        "images": len(loader.dataset) if loader is not None else None,
        "batch_size": getattr(data, "batch_size", None),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        **settings,
        "validation": {"num_slots": val_num_slots, **validation_figures(trainer)},
        "versions": {
            "ocvtp": __version__,  # which need not be installed
            **{
                name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "pytorch-lightning")
            },
        },
    }


def validation_figures(trainer: Any) -> dict[str, float]:
    """Those of the last validation, without `val/` before their names."""
    return {
        name.removeprefix("val/"): round(float(value), 6)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val/") and math.isfinite(float(value))
    }


def data_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was trained on.

    Args:
        settings: of the run, see `ocvtp.training.resume.run_settings`.

    Returns:
        `class` of the data, and all of its settings that are not null; empty where none are known.
    """
    data = dict(settings.get("data") or {})
    own = data.pop("init_args", None) or {}
    name = data.pop("class_path", "").rpartition(".")[2]
    found = {**({"class": name} if name else {}), **data, **own}
    return {key: value for key, value in found.items() if value is not None}


class Curve:
    """The figures of all validations of a run so far, or every second of them where there are many.

    Attributes:
        points: of each `step` and the figures.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Those of the last validation, if they are new."""
        last = self.points[-1] if self.points else {}
        if not figures or {**last, "step": 0} == {**figures, "step": 0}:
            return
        if last.get("step") == step:
            self.points.pop()
        self.points.append({"step": step, **figures})
        if len(self.points) > _MOST:
            del self.points[1:-1:2]


def epochs_run(trainer: Any) -> int | float:
    """Epochs that were trained; inside of one, with the share of its batches."""
    batches = trainer.num_training_batches
    whole, done = epochs_done(trainer)
    if not batches or math.isinf(batches):
        return int(trainer.fit_loop.epoch_progress.current.processed)
    exact = float(whole + done / batches)
    return int(exact) if exact.is_integer() else round(exact, 3)
