"""What all plots share: panels below each other, colours, axes, and names beside lines.

Drawn on an Agg canvas of their own: nothing touches pyplot or matplotlib's global state. A drawing
is as wide as a page of text at 120 dots an inch, or as narrow as a column of a paper; then letters
are smaller, and the names of lines are below the panel instead of beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#8c6d1f",
)  # fmt: skip
"""Told apart by the colour-blind too: Okabe and Ito 2008, and two more; see `MARKERS`."""
MARKERS = "osD^vPX*"
"""As many as colours, so that neither is needed alone."""
GREY, FAINT, INK = "#707070", "#d8d8d8", "#222222"
GRID = "#e4e4e4"
WIDTH = 7.2
"""Inches of a drawing on a page."""
NARROWEST = 2.0
_LINE = 0.155  # inches between names
_AROUND = 0.9  # inches of a panel that its axes do not have
_BELOW = (46, 26, 12)  # characters of a name below a panel, in one column, two and three
_MANY = 12  # names that get two columns, though some are cut


@dataclass(frozen=True)
class Look:
    """Sizes that go with the width of a drawing.

    Args:
        beside: whether the names of lines are beside the panel, not below it.
        text, axis, title: points of ticks and names, of the axes' names, and of titles.
        letter: width of a tick's letter over that of the axes.
        size: of dots and lines over what they are on a page.
        height: the same of panels.
        longest: characters of a name.
    """

    beside: bool = True
    text: float = 8.0
    axis: float = 9.0
    title: float = 10.0
    letter: float = 0.016
    size: float = 1.0
    height: float = 1.0
    longest: int = 36


_PAGE = Look()
_COLUMN = Look(
    beside=False, text=6.5, axis=7.0, title=8.0, letter=0.024, size=0.7, height=0.6, longest=32
)


def look(width: float) -> Look:
    """The sizes for a drawing of so many inches.

    Raises:
        ValueError: if it is too narrow for anything.
    """
    if not NARROWEST <= width <= 100:
        raise ValueError(f"a drawing of {width} inches; pass a width of {NARROWEST} to 100.")
    return _PAGE if width >= 5 else _COLUMN


def _look_of(axis: Any) -> Look:
    return look(axis.figure.get_figwidth())


@dataclass(frozen=True)
class Mark:
    """How a label is drawn, in all plots of one run.

    Args:
        colour: of its line and its name. marker: of its dots.
        line: of controls dashed.
    """

    colour: str
    marker: str
    line: str = "-"

    @property
    def control(self) -> bool:
        """Whether its dots are hollow."""
        return self.line != "-"

    def style(self, size: float = 1.0) -> dict[str, Any]:
        """Arguments of a line, its dots so many times as large as on a page."""
        hollow = {"mfc": "white"} if self.control else {}
        dots = {"marker": self.marker, "ms": 5 * size}
        return {"color": self.colour, "ls": self.line, **dots, **hollow}


def marks(methods: Iterable[str], controls: Iterable[str] = ()) -> dict[str, Mark]:
    """How labels are drawn, in this order.

    Of 64 methods no two share both colour and marker, and of 8 no two share either.

    Args:
        methods: have colours. controls: are grey.
    """
    found = {}
    for number, label in enumerate(dict.fromkeys(methods)):
        again, colour = divmod(number, len(COLOURS))
        found[label] = Mark(COLOURS[colour], MARKERS[(colour + again) % len(MARKERS)])
    for number, label in enumerate(dict.fromkeys(controls)):
        again, marker = divmod(number, len(MARKERS))
        found[label] = Mark(GREY, MARKERS[marker], ("--", "-.", ":")[again % 3])
    return found


@dataclass(frozen=True)
class Name:
    """What stands beside the end of a line.

    Args:
        text: shortened where it is long. x, y: of the end. colour: of both.
        bold: whether it is set off.
        drawn: the line, for a legend.
    """

    text: str
    x: float
    y: float
    colour: str
    bold: bool = False
    drawn: Any = None


@dataclass(frozen=True)
class Row:
    """A figure and its interval, in a row of its own.

    Args:
        text: its name. value: on the axis. low, high: of the interval.
        mark: how it is drawn.
        bold: whether its name is set off.
        full: whether the dot is; None for what the mark says.
    """

    text: str
    value: float
    low: float
    high: float
    mark: Mark
    bold: bool = False
    full: bool | None = None


def canvas(heights: Sequence[float], width: float = WIDTH) -> tuple[Figure, list[Any]]:
    """A figure of panels below each other, of these heights in inches."""
    pad = 0.12 if look(width).beside else 0.04
    layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
    drawing = Figure(figsize=(width, sum(heights)), layout=layout)
    FigureCanvasAgg(drawing)
    ratios = {"height_ratios": list(heights)}
    axes = list(drawing.subplots(len(heights), 1, squeeze=False, gridspec_kw=ratios)[:, 0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=look(width).text, colors=INK)
    return drawing, axes


def height_for(names: Sequence[str], least: float, width: float = WIDTH) -> float:
    """Inches of a panel that has room for these names of lines, beside or below it."""
    own = look(width)
    if own.beside:
        return max(least, _AROUND + _LINE * (len(names) + 2))
    return own.height * least + _step(own) * (ceil(len(names) / _columns(names)) + 1.5)


def bars_height(count: int, around: float, each: float, width: float = WIDTH) -> float:
    """Inches of a panel of so many rows, and of what is around them, on a page and narrower."""
    own = look(width)
    return around * (1 if own.beside else 0.85) + each * count * (1 if own.beside else 0.68)


def label(axis: Any, title: str, x: str, y: str = "", grid: str = "y") -> None:
    """Title and axes; `grid` is one of x, y and both."""
    own = _look_of(axis)
    letters = int(axis.figure.get_figwidth() * 72 * 0.8 / (0.52 * own.axis))
    side = "right" if grid == "x" and not own.beside else None  # above and below the ticks' names
    axis.set_title(_lines(title, letters), fontsize=own.title, loc=side or "left")
    axis.set_xlabel(_lines(x, letters), fontsize=own.axis, loc=side)
    axis.set_ylabel(_lines(y, letters if own.beside else 36), fontsize=own.axis)
    axis.grid(axis=grid, color=GRID, lw=0.6)
    axis.set_axisbelow(True)


def _lines(text: str, letters: int) -> str:
    """A text in two lines where it is longer, if it can be at a bracket or comma."""
    if len(text) <= letters:
        return text
    places = [n for n in range(letters) if text[n : n + 2] == " (" or text[n - 1 : n + 1] == ", "]
    if not places:
        return "\n".join(wrap(text, letters))
    return f"{text[: places[-1]]}\n{text[places[-1] + 1 :]}"


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
    letter = _look_of(axis).letter
    shown, last = [], -np.inf
    for count, text in zip(counts, texts, strict=True):
        place = abs(np.log(count / counts[0])) / span
        shown.append(text if place - last >= letter * (len(text) + 1) else "")
        last = place if shown[-1] else last
    axis.set_xticklabels(shown)


def beside(number: int, of: int, width: float) -> float:
    """Factor on a log axis that sets the dots of one of several lines beside those of the others.

    Args:
        number: of the line, from 0. of: how many there are. width: of all, a logarithm.
    """
    return float(np.exp(width * (number / (of - 1) - 0.5))) if of > 1 else 1.0


def name_ends(axis: Any, names: Sequence[Name], inches: float, note: str = "") -> None:
    """Names of lines: right of a panel of so many inches, moved apart where they would overlap.

    Below a narrow one, the highest first. A note stands above names below, else above the panel.
    """
    own = _look_of(axis)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)
    names = sorted(names, key=lambda name: name.y)
    if not own.beside:
        _legend(axis, names[::-1], own, note)
        return
    if note:
        axis.text(1, 1.02, note, transform=axis.transAxes, fontsize=7.5, color=GREY, ha="right")
    line = {"arrowstyle": "-", "lw": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
    places = _name_places([name.y for name in names], (low, high), inches)
    for name, place in zip(names, places, strict=True):
        axis.annotate(
            shortened(name.text), (name.x, name.y), xytext=(1.04, place),
            textcoords=axis.get_yaxis_transform(), fontsize=own.text, color=name.colour,
            va="center", weight="bold" if name.bold else "normal", annotation_clip=False,
            arrowprops={**line, "color": name.colour},
        )  # fmt: skip


def _name_places(values: Sequence[float], span: tuple[float, float], inches: float) -> list[float]:
    """Heights of the names beside a panel of so many inches, for ascending ends of lines.

    Args:
        values: of the ends. span: of the axis, from and to.
    """
    low, high = span
    gap = (high - low) * _LINE / max(inches - _AROUND, _LINE)
    places = spread([min(max(value, low), high) for value in values], gap)
    step = gap * np.arange(len(values))
    found: list[float] = np.clip(
        places, low + step, np.maximum(high - step[::-1], low + step)
    ).tolist()
    return found


def _legend(axis: Any, names: Sequence[Name], own: Look, note: str) -> None:
    """Lines and their names below the axis' own name."""
    columns = _columns([name.text for name in names])
    texts = alike_long([name.text for name in names], _BELOW[columns - 1])
    lines = 1 + axis.get_xlabel().count("\n")
    below = -(own.text + 12 + 1.35 * own.axis * lines) / 72
    place = axis.transAxes + ScaledTranslation(0, below, axis.figure.dpi_scale_trans)
    found = axis.legend(
        [name.drawn for name in names], texts, ncols=columns, fontsize=own.text,
        loc="upper left", bbox_to_anchor=(-0.17, 0), bbox_transform=place, borderaxespad=0,
        frameon=False, labelspacing=0.25, columnspacing=0.5, handlelength=1.8, handletextpad=0.4,
        title=note, title_fontsize=own.text, alignment="left",
    )  # fmt: skip
    found.get_title().set_color(GREY)
    for text, name in zip(found.get_texts(), names, strict=True):
        text.set_color(GREY if name.colour == GREY else INK)  # its line has the colour
        text.set_fontweight("bold" if name.bold else "normal")


def _step(own: Look) -> float:
    """Inches of a line of a legend."""
    return 1.35 * own.text / 72


def _columns(texts: Sequence[str]) -> int:
    """Of a legend: as many as the longest name leaves room for."""
    longest = max(map(len, texts), default=0)
    fitting = [n for n, letters in enumerate(_BELOW, 1) if longest <= letters]
    return max([*fitting, 2 if len(texts) >= _MANY else 1])


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


def shortened(text: str, longest: int = _PAGE.longest) -> str:
    """A long name without its middle."""
    if len(text) <= longest:
        return text
    head = longest // 2 - 1
    return f"{text[:head]}…{text[-(longest - head - 1) :]}"


def alike_long(texts: Sequence[str], longest: int) -> list[str]:
    """Shortened, all of them to as many characters as are needed to tell them apart."""
    for length in range(longest, max(map(len, texts), default=0)):
        found = [shortened(text, length) for text in texts]
        if len(set(found)) == len(set(texts)):
            return found
    return list(texts)


def draw_rows(axis: Any, rows: Sequence[Row]) -> None:
    """Dots with their intervals, a row each, the first on top, and their names at the left."""
    size = _look_of(axis).size
    for place, row in enumerate(rows):
        colour, dots = row.mark.colour, row.mark.style(size) | {"ls": ""}
        if row.full is not None:
            dots["mfc"] = colour if row.full else "white"
        faint = 0.6 if row.full is False else 1.0
        axis.plot([row.low, row.high], [place, place], color=colour, lw=1.4 * size, alpha=faint)
        axis.plot([row.value], [place], **dots)
    name_rows(axis, [row.text for row in rows])
    for tick, row in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_color(GREY if row.mark.control else INK)
        tick.set_fontweight("bold" if row.bold else "normal")
    axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)


def name_rows(axis: Any, texts: Sequence[str]) -> None:
    """Names of rows at the left of a panel, at 0, 1, ... of its axis."""
    axis.set_yticks(range(len(texts)), alike_long(texts, _look_of(axis).longest))
