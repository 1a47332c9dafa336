"""Curves of training runs, one figure of all of them below the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ocvtp.reporting.plain_text import better
from ocvtp.reporting.plot_style import (
    COLOURS,
    MARKERS,
    Name,
    canvas,
    height_for,
    label,
    name_ends,
)
from ocvtp.reporting.training_runs import Run, is_higher_better

_SMOOTH = 25  # of the logged values of a training loss, at most a tenth of them
_TRAIN = "train/loss"


def plot_runs(runs: Sequence[Run], figures: Sequence[str]) -> Figure:
    """A panel for the training loss and one for each figure of the validation.

    Args:
        runs: of which some may lack some figures.
        figures: by their names in the logs.
    """
    shown = [name for name in (_TRAIN, *figures) if any(run.curves.get(name) for run in runs)]
    height = height_for([run.name for run in runs], 2.0)
    drawing, axes = canvas([height] * max(1, len(shown)))
    for axis, figure in zip(axes, shown, strict=False):
        ends = []
        for number, run in enumerate(runs):
            points = run.curves.get(figure)
            if not points:
                continue
            steps, values = np.array([p[0] + 1 for p in points]), np.array([p[1] for p in points])
            colour = COLOURS[number % len(COLOURS)]
            marker = MARKERS[number % len(MARKERS)]
            if figure == _TRAIN:
                values = _smooth(values)
            every = max(1, len(steps) // 12)
            axis.plot(steps, values, color=colour, marker=marker, markevery=every, ms=3.5, lw=1.3)
            ends.append(Name(run.name, float(steps[-1]), float(values[-1]), colour))
        text = f"{figure}, smoothed" if figure == _TRAIN else figure
        label(axis, better(text, not is_higher_better(figure)), "step")
        name_ends(axis, ends, height)
    if not shown:
        label(axes[0], "nothing was logged", "step")
    return drawing


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of so many values around each, fewer at the ends."""
    width = max(1, min(_SMOOTH, len(values) // 10))
    window = np.ones(width)
    counted = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / counted
