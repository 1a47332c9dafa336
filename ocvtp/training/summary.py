"""What an artifact says of the run that made it."""

from __future__ import annotations

import importlib.metadata
import math
from typing import Any

import pytorch_lightning as pl

from ocvtp.training.schedule import epochs_done


def training_summary(
    trainer: pl.Trainer, settings: dict[str, Any], val_num_slots: float
) -> dict[str, Any]:
    """Plain values: steps, epochs, images, settings, figures of the validation, versions.

    Args:
        trainer: in or after a run.
        settings: of the module, taken over as they are.
        val_num_slots: slot count, or budget, of the validation.
    """
    figures = {
        name.removeprefix("val/"): round(float(value), 6)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val/") and math.isfinite(float(value))
    }
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
        "validation": {"num_slots": val_num_slots, **figures},
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("ocvtp", "torch", "transformers", "pytorch-lightning")
        },
    }


def epochs_run(trainer: Any) -> int | float:
    """Epochs that were trained; inside of one, with the share of its batches."""
    batches = trainer.num_training_batches
    whole, done = epochs_done(trainer)
    if not batches or math.isinf(batches):
        return int(trainer.fit_loop.epoch_progress.current.processed)
    exact = float(whole + done / batches)
    return int(exact) if exact.is_integer() else round(exact, 3)
