"""Plots of an evaluation, from what results.json holds.

Drawn on an Agg canvas of their own: nothing touches pyplot or matplotlib's global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from ocvtp.evaluation.conditions import UNPRUNED
from ocvtp.evaluation.tables import (
    Facts,
    budget_text,
    excludes_zero,
    focus,
    number_text,
    pruned_budgets,
    ranked,
)

_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#8c6d1f",
)  # fmt: skip
"""Told apart by the colour-blind too: Okabe and Ito 2008, and two more."""
_GREY, _FAINT, _INK = "#707070", "#d8d8d8", "#222222"


def accuracy(facts: Facts) -> Figure | None:
    """Every metric against the share of tokens kept, a panel each; fewer tokens to the right.

    The best pruners at the smallest budget but one have colours, the same in all panels, and
    intervals; controls are dashed, the others faint.

    Args:
        facts: see `ocvtp.evaluation.report.results`.

    Returns:
        None where no budget is below 1.
    """
    if not pruned_budgets(facts):
        return None
    metrics = facts["metrics"]
    drawing, panels = _canvas(len(metrics), width=6.4, height=5.2)
    colours = _colours(facts)
    for panel, metric in zip(panels, metrics, strict=True):
        _draw_lines(panel, facts, metric, colours)
    return drawing


def differences(facts: Facts) -> Figure | None:
    """Paired differences to random at the smallest budget but one, with intervals, best on top.

    Args:
        facts: see `ocvtp.evaluation.report.results`.

    Returns:
        None where there are none.
    """
    if not pruned_budgets(facts):
        return None
    budget = focus(facts)
    rows = {
        metric: [
            row
            for row in ranked(facts, metric, budget)
            if _has(row, metric) and row["figures"][metric]["minus_random"]
        ]
        for metric in facts["metrics"]
    }
    longest = max(map(len, rows.values()))
    if not longest:
        return None
    drawing, panels = _canvas(len(rows), width=5.4, height=1.2 + 0.2 * longest)
    for panel, (metric, shown) in zip(panels, rows.items(), strict=True):
        _draw_dots(panel, facts, metric, shown)
    return drawing


def _canvas(panels: int, width: float, height: float) -> tuple[Figure, Sequence[Any]]:
    """A figure of panels side by side; inches of each."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    drawing = Figure(figsize=(panels * width, height), layout=layout)
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=_INK)
    return drawing, axes


def _best_first(facts: Facts, metric: str) -> dict[str, bool]:
    """Labels that have figures, best first, and which are controls."""
    budgets = (focus(facts), *pruned_budgets(facts))
    ordered = [row for budget in budgets for row in ranked(facts, metric, budget)]
    return {row["label"]: row["control"] for row in ordered if _has(row, metric)}


def _colours(facts: Facts) -> dict[str, str]:
    """Colours of the best pruners: of every metric the best, of every metric the second, ..."""
    orders = [_best_first(facts, metric) for metric in facts["metrics"]]
    pruners = [[label for label, control in order.items() if not control] for order in orders]
    turns = [label for turn in zip_longest(*pruners) for label in turn if label is not None]
    return dict(zip(dict.fromkeys(turns), _COLOURS, strict=False))


def _draw_lines(axis: Any, facts: Facts, metric: str, colours: dict[str, str]) -> None:
    """One metric against the budget."""
    columns, scale = pruned_budgets(facts), _scale(facts)
    control = _best_first(facts, metric)
    lines = {label: _line(facts, metric, label) for label in control}
    ends = []
    for label, line in reversed(lines.items()):  # the best on top
        x, value, low, high = line.T
        colour = colours.get(label, _GREY if control[label] else _FAINT)
        style = {"ls": "--" if control[label] else "-", "lw": 1.6 if label in colours else 1.0}
        if label in colours:
            axis.fill_between(x, low, high, color=colour, alpha=0.08, lw=0)
        if label in colours or control[label]:
            style |= {"marker": "o", "ms": 3, "zorder": 2.5}  # above faint ones
            ends.append((label, float(x[-1]), float(value[-1]), colour))
        axis.plot(x, value, color=colour, **style)
    _draw_unpruned(axis, facts, metric)
    _label_axes(axis, columns, metric, scale)
    _label_ends(axis, ends)
    faint = len(lines) - len(ends)
    legend = "dashed: controls" + (f"; faint: {faint} more pruners" if faint else "")
    axis.text(0.01, 0.01, legend, transform=axis.transAxes, fontsize=7.5, color=_GREY)


def _line(facts: Facts, metric: str, label: str) -> NDArray[np.float64]:
    """[P, 4] budget, value, low and high, many tokens first; only where there is a figure."""
    points = [
        (row["budget"], *_scaled(row["figures"][metric], _scale(facts)))
        for row in facts["rows"]
        if row["label"] == label and row["budget"] in pruned_budgets(facts) and _has(row, metric)
    ]
    return np.array(sorted(points, reverse=True))


def _draw_unpruned(axis: Any, facts: Facts, metric: str) -> None:
    """A horizontal line and its interval."""
    for row in facts["rows"]:
        if row["label"] == UNPRUNED and _has(row, metric):
            value, low, high = _scaled(row["figures"][metric], _scale(facts))
            text = f"{UNPRUNED} {number_text(row['figures'][metric]['value'], facts['percent'])}"
            axis.axhline(value, color=_INK, lw=1)
            axis.axhspan(low, high, color=_INK, alpha=0.06, lw=0)
            axis.annotate(
                text, (0.01, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", fontsize=8, color=_INK,
            )  # fmt: skip


def _label_axes(axis: Any, columns: Sequence[float], metric: str, scale: float) -> None:
    """Budgets on a log axis, many tokens to the left."""
    axis.set_xscale("log")
    axis.set_xlim(columns[0] * 1.08, columns[-1] / 1.08)
    axis.xaxis.set_major_locator(FixedLocator(columns))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([budget_text(budget) for budget in columns])
    axis.set_xlabel("share of visual tokens kept (log scale)", fontsize=9)
    axis.set_ylabel("percent" if scale == 100 else "share", fontsize=9)
    axis.set_title(metric, fontsize=10, loc="left")
    axis.grid(axis="y", color="#eeeeee", lw=0.6)
    axis.set_axisbelow(True)


def _label_ends(axis: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names beside the right end of lines, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)
    names = sorted(ends, key=lambda end: end[2])
    line = {"arrowstyle": "-", "lw": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
    gap = (high - low) * 0.036
    places = spread([value for _, _, value, _ in names], gap)
    for (label, x, value, colour), place in zip(names, places, strict=True):
        axis.annotate(
            label, (x, value), xytext=(1.04, place), textcoords=axis.get_yaxis_transform(),
            fontsize=7.5, color=colour, va="center", annotation_clip=False,
            arrowprops={**line, "color": colour},
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


def _draw_dots(axis: Any, facts: Facts, metric: str, rows: Sequence[Facts]) -> None:
    """One metric's differences to random."""
    scale = _scale(facts)
    axis.axvline(0, color=_INK, lw=0.8)
    for place, row in enumerate(rows):
        minus = row["figures"][metric]["minus_random"]
        value, low, high = _scaled(minus, scale)
        sure = excludes_zero(minus)
        colour = _GREY if row["control"] else (_COLOURS[0] if sure else "#8fb8d6")
        axis.plot([low, high], [place, place], color=colour, lw=1.4)
        face = colour if sure else "white"
        axis.plot([value], [place], "o", color=colour, mfc=face, ms=5)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
    for tick, row in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_color(_GREY if row["control"] else _INK)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the best on top
    axis.grid(axis="x", color="#eeeeee", lw=0.6)
    axis.set_axisbelow(True)
    unit = "points" if scale == 100 else "share"
    axis.set_xlabel(f"minus random, {unit}, 95% interval (full dot: without 0)", fontsize=8)
    axis.set_title(f"{metric}, {budget_text(focus(facts))} of the tokens", fontsize=10, loc="left")


def _has(row: Facts, metric: str) -> bool:
    """Whether there is a figure, and something counted in it."""
    return row["figures"].get(metric, {}).get("value") is not None


def _scale(facts: Facts) -> float:
    return 100.0 if facts["percent"] else 1.0


def _scaled(figure: Facts, scale: float) -> tuple[float, float, float]:
    """Value, low and high; without an interval the value thrice."""
    value = figure["value"]
    low, high = (value if figure[key] is None else figure[key] for key in ("low", "high"))
    return scale * value, scale * low, scale * high
