"""What all plots share: panels below each other, colours, axes, and names beside lines.

Drawn on an Agg canvas of their own: nothing touches pyplot or matplotlib's global state. A panel is
as wide as a column of text at 120 dots an inch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#8c6d1f",
)  # fmt: skip
"""Told apart by the colour-blind too: Okabe and Ito 2008, and two more; see `MARKERS`."""
MARKERS = "osD^vPX*"
"""As many as colours, so that neither is needed alone."""
GREY, FAINT, INK = "#707070", "#d8d8d8", "#222222"
GRID = "#e4e4e4"
WIDTH = 7.2  # inches
_TEXT = 8.0  # points
_LINE = 0.155  # inches between names
_AROUND = 0.9  # inches of a panel that its axes do not have
_LONGEST = 36  # characters of a name


@dataclass(frozen=True)
class Name:
    """What stands beside the end of a line.

    Args:
        text: shortened where it is long. x, y: of the end. colour: of both.
        bold: whether it is set off.
    """

    text: str
    x: float
    y: float
    colour: str
    bold: bool = False


def canvas(heights: Sequence[float]) -> tuple[Figure, list[Any]]:
    """A figure of panels below each other, of these heights in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    drawing = Figure(figsize=(WIDTH, sum(heights)), layout=layout)
    FigureCanvasAgg(drawing)
    ratios = {"height_ratios": list(heights)}
    axes = list(drawing.subplots(len(heights), 1, squeeze=False, gridspec_kw=ratios)[:, 0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=_TEXT, colors=INK)
    return drawing, axes


def height_for(names: int, least: float) -> float:
    """Inches of a panel that has room for so many names at its right."""
    return max(least, _AROUND + _LINE * (names + 2))


def label(axis: Any, title: str, x: str, y: str = "", grid: str = "y") -> None:
    """Title and axes; `grid` is one of x, y and both."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.grid(axis=grid, color=GRID, lw=0.6)
    axis.set_axisbelow(True)


def better(name: str, lower: bool) -> str:
    """The text of an axis, and which way is better where that is down."""
    return f"{name} (lower is better)" if lower else name


def limits(
    values: Sequence[float], least: float, floor: float = -np.inf, ceiling: float = np.inf
) -> tuple[float, float]:
    """From and to of an axis that shows all values and is never narrower than `least`.

    Args:
        values: what is shown, at least one.
        least: of the span, so that equal values look equal.
        floor, ceiling: beyond which there can be none; the axis goes a little further.
    """
    low, high = min(values), max(values)
    span = max(high - low, least)
    middle = (low + high) / 2
    low, high = middle - 0.55 * span, middle + 0.55 * span
    slack = 0.03 * span
    if low < floor - slack:
        low, high = floor - slack, max(high, floor - slack + 1.1 * span)
    if high > ceiling + slack:
        low, high = min(low, ceiling + slack - 1.1 * span), ceiling + slack
    return float(max(low, floor - slack)), float(high)


def counts_axis(axis: Any, counts: Sequence[float], texts: Sequence[str]) -> None:
    """A log axis with a tick at each count, in order; texts that would touch are left out."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(counts))
    axis.xaxis.set_minor_locator(NullLocator())
    span = abs(np.log(counts[-1] / counts[0])) or 1.0
    shown, last = [], -np.inf
    for count, text in zip(counts, texts, strict=True):
        place = abs(np.log(count / counts[0])) / span
        shown.append(text if place - last >= 0.016 * (len(text) + 1) else "")
        last = place if shown[-1] else last
    axis.set_xticklabels(shown)


def beside(number: int, of: int, width: float) -> float:
    """Factor on a log axis that sets the dots of one of several lines beside those of the others.

    Args:
        number: of the line, from 0. of: how many there are. width: of all, a logarithm.
    """
    return float(np.exp(width * (number / (of - 1) - 0.5))) if of > 1 else 1.0


def name_ends(axis: Any, names: Sequence[Name], inches: float) -> None:
    """Names to the right of a panel of so many inches, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)
    gap = (high - low) * _LINE / max(inches - _AROUND, _LINE)
    names = sorted(names, key=lambda name: name.y)
    line = {"arrowstyle": "-", "lw": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
    places = spread([min(max(name.y, low), high) for name in names], gap)
    step = gap * np.arange(len(names))
    places = np.clip(places, low + step, np.maximum(high - step[::-1], low + step)).tolist()
    for name, place in zip(names, places, strict=True):
        axis.annotate(
            shortened(name.text), (name.x, name.y), xytext=(1.04, place),
            textcoords=axis.get_yaxis_transform(), fontsize=_TEXT, color=name.colour, va="center",
            weight="bold" if name.bold else "normal", annotation_clip=False,
            arrowprops={**line, "color": name.colour},
        )  # fmt: skip


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Ascending places at least `gap` apart, as near to ascending values as can be.

    Values that would overlap are pooled and laid around their mean: isotonic regression of
    `values - gap * position` by pool-adjacent-violators.
    """
    pools: list[list[float]] = []
    for position, value in enumerate(values):
        pools.append([value - gap * position])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    level = [float(np.mean(pool)) for pool in pools for _ in pool]
    return [place + gap * position for position, place in enumerate(level)]


def shortened(text: str) -> str:
    """A long name without its middle."""
    if len(text) <= _LONGEST:
        return text
    head = _LONGEST // 2 - 1
    return f"{text[:head]}…{text[-(_LONGEST - head - 1) :]}"
