"""The learning rate over a run."""

from __future__ import annotations

import math

import pytorch_lightning as pl


def planned_steps(trainer: pl.Trainer) -> int:
    """Optimizer steps of the whole run.

    Raises:
        ValueError: if the run has no known end.
    """
    total = trainer.estimated_stepping_batches
    if math.isinf(total) or total < 0:  # -1 of a loader without a length
        raise ValueError(
            "the learning rate falls over the whole run, so its length must be known, and neither"
            f" epochs (max_epochs={trainer.max_epochs}) nor steps (max_steps={trainer.max_steps})"
            " end this one; pass --trainer.max_steps N or --trainer.max_epochs N."
            " --trainer.max_time may then end it earlier."
        )
    return int(total)


def warmup_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Share of the peak rate at a step: linear up to 1 at step `warmup`, cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
