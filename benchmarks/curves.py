"""Draw the curves of a healthy training run, from the metrics.csv beside them: `make plots`.

The run: `ocvtp train --config demo_kept --trainer.check_val_every_n_epoch 1`, whose folder holds
`csv/version_0/metrics.csv`.
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from ocvtp.reporting.plot_style import COLOURS, GREY, canvas, label

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "train-demo"
Points = list[tuple[float, float]]


def points(name: str) -> Points:
    """(epoch, value) of one logged figure; there are 93 steps in an epoch."""
    with (FOLDER / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[name]]
    return [((int(row["step"]) + 1) / 93, float(row[name])) for row in rows]


def curves() -> Figure:
    """Loss, error of the restored tokens, and tokens of one slot each."""
    drawing, (loss, error, unique) = canvas((2.3, 1.9, 1.9))
    loss.plot(*zip(*points("train/loss"), strict=True), color=GREY, lw=0.8, label="train/loss")
    lines = [(loss, "val/loss"), (error, "val/ridge_error"), (unique, "val/unique_tokens")]
    for (axis, name), colour in zip(lines, COLOURS, strict=False):
        epochs, values = zip(*points(name), strict=True)
        axis.plot(epochs, values, color=colour, marker="o", ms=4, lw=1.8, label=name)
        axis.set_xlim(0, 12.3)
    loss.legend(frameon=False, fontsize=8)
    label(loss, "loss: falls fast, then slowly; train of 8 to 24 slots, val of 16", "", "loss")
    label(error, "val/ridge_error: what the kept tokens cannot restore", "", "share")
    label(
        unique, "val/unique_tokens: tokens that 16 slots choose without a double", "epoch", "tokens"
    )
    return drawing
