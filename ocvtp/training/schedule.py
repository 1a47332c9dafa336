"""The learning rate over a run, which follows the share of the run that is done.

Steps are counted as this number of devices would have taken them: an epoch is an epoch, however
many devices shared the epochs before.
"""

from __future__ import annotations

import math
from typing import Any

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


def steps_done(trainer: Any) -> float:
    """Of `planned_steps`; where epochs end the run, by the epochs that are done."""
    batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
    if not batches or math.isinf(batches):
        return float(trainer.global_step)
    each = math.ceil(batches / accumulated)
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if steps is not None and steps >= 0 and (epochs in (None, -1) or steps < epochs * each):
        return float(trainer.global_step)
    whole, batch = epochs_done(trainer)
    return float(whole * each + (each if batch == batches else batch / accumulated))


def epochs_done(trainer: Any) -> tuple[int, int]:
    """Epochs that were trained before this one, and batches of this one.

    `trainer.current_epoch` counts an epoch after its validation, where checkpoints are written.
    """
    epochs = trainer.fit_loop.epoch_progress.current
    if not epochs.started or not trainer.num_training_batches:
        return int(epochs.processed), 0
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    return int(epochs.started) - 1, int(done)


def count_whole_epoch(trainer: Any) -> None:
    """Let an epoch that ended before a checkpoint be whole on this number of devices too.

    Lightning counts its batches: of an epoch of 6, continued where it has 12, it would leave out
    the first 6 of the next. To be called when training starts.
    """
    if is_at_an_end(trainer):
        current = trainer.fit_loop.epoch_loop.batch_progress.current
        more = trainer.num_training_batches - current.ready
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + more)


def begin_epoch(trainer: Any) -> None:
    """Count the next epoch as begun where the last step of one wrote the checkpoint.

    Lightning does not. To be called when training starts, and what was done has been counted.
    """
    epochs = trainer.fit_loop.epoch_progress
    if not is_at_an_end(trainer):
        return
    if trainer.fit_loop.restarted_mid_epoch and epochs.current.processed == epochs.current.started:
        epochs.increment_ready()
        epochs.increment_started()


def is_at_an_end(trainer: Any) -> bool:
    """Whether the checkpoint that is continued was written after the last batch of an epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    known = not math.isinf(trainer.num_training_batches)
    return bool(progress.is_last_batch and progress.current.ready and known)


def warmup_cosine(step: float, warmup: int, total: int, floor: float) -> float:
    """Share of the peak rate at a step: linear up to 1 at step `warmup`, cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
