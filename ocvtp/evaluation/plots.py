"""Plots of an evaluation, from what results.json holds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ocvtp.evaluation.conditions import SHUFFLED, UNPRUNED
from ocvtp.evaluation.tables import (
    Facts,
    budget_text,
    excludes_zero,
    focus,
    has_figure,
    number_text,
    pruned_budgets,
    ranked,
)
from ocvtp.reporting.plot_style import (
    COLOURS,
    FAINT,
    GREY,
    INK,
    WIDTH,
    Name,
    bars_height,
    beside,
    better,
    canvas,
    counts_axis,
    height_for,
    label,
    limits,
    look,
    marks,
    name_ends,
    name_rows,
)
from ocvtp.reporting.plot_style import spread as spread

_WHOLE = (UNPRUNED, SHUFFLED)
_LEAST = 0.1  # of an axis of shares
_ALONE = 0.7  # of the logarithms of a single budget's dots


def accuracy(facts: Facts, width: float = WIDTH) -> Figure | None:
    """Every metric against the share of tokens kept, a panel each; fewer tokens to the right.

    Methods of the user's own and the best others at the smallest budget but one have colours and
    intervals; controls are dashed, the others faint.

    Args:
        facts: see `ocvtp.evaluation.report.results`.
        width: inches.

    Returns:
        None where no budget is below 1.
    """
    if not pruned_budgets(facts):
        return None
    loud = _loud(facts)
    names = [_best_first(facts, metric) for metric in facts["metrics"]]
    named = [[UNPRUNED, *(n for n, c in one.items() if n in loud or c)] for one in names]
    heights = [height_for(one, least=4.4, width=width) for one in named]
    drawing, panels = canvas(heights, width)
    for panel, metric, height in zip(panels, facts["metrics"], heights, strict=True):
        _draw_lines(panel, facts, metric, loud, height)
    return drawing


def narrowed(facts: Facts, labels: Collection[str], metrics: Sequence[str]) -> Facts:
    """What of the facts is to be drawn: these labels and the unpruned model, and these metrics."""
    rows = [row for row in facts["rows"] if row["label"] in labels or row["label"] == UNPRUNED]
    return {**facts, "rows": rows, "metrics": list(metrics)}


def differences(facts: Facts, width: float = WIDTH) -> Figure | None:
    """Paired differences to random at the smallest budget but one, with intervals, best on top.

    Args:
        facts: see `ocvtp.evaluation.report.results`.
        width: inches.

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
            if has_figure(row, metric) and row["figures"][metric]["minus_random"]
        ]
        for metric in facts["metrics"]
    }
    if not any(rows.values()):
        return None
    heights = [bars_height(max(len(shown), 1), 1.2, 0.2, width) for shown in rows.values()]
    drawing, panels = canvas(heights, width)
    for panel, (metric, shown) in zip(panels, rows.items(), strict=True):
        _draw_dots(panel, facts, metric, shown)
    return drawing


def order(facts: Facts) -> tuple[list[str], list[str]]:
    """Labels of methods, and of controls, in the order in which they are given colours and markers.

    That is the order of the rows; where there are more methods than colours, those come first that
    are not drawn faintly.

    Args:
        facts: see `ocvtp.evaluation.report.results`.
    """
    rows = [row for row in facts["rows"] if row["figures"] and row["label"] not in _WHOLE]
    controls = [row["label"] for row in rows if row["control"]]
    methods = [row["label"] for row in rows if not row["control"]]
    if len(set(methods)) > len(COLOURS):
        methods = [*_loud(facts), *methods]
    return list(dict.fromkeys(methods)), list(dict.fromkeys(controls))


def _best_first(facts: Facts, metric: str) -> dict[str, bool]:
    """Labels that have figures, best first, and which are controls."""
    budgets = (focus(facts), *pruned_budgets(facts))
    ordered = [row for budget in budgets for row in ranked(facts, metric, budget)]
    return {row["label"]: row["control"] for row in ordered if has_figure(row, metric)}


def _yours(facts: Facts) -> set[str]:
    """Labels of the user's own methods."""
    return {row["label"] for row in facts["rows"] if row.get("yours")}


def _loud(facts: Facts) -> list[str]:
    """The user's own methods, then of every metric the best, the second, ...: one a colour."""
    orders = [_best_first(facts, metric) for metric in facts["metrics"]]
    pruners = [[name for name, control in order.items() if not control] for order in orders]
    turns = [name for turn in zip_longest(*pruners) for name in turn if name is not None]
    yours = _yours(facts)
    first = sorted(dict.fromkeys(turns), key=lambda name: name not in yours)
    count = max(len(COLOURS), sum(name in yours for name in first))
    return first[:count]


def _draw_lines(axis: Any, facts: Facts, metric: str, loud: Collection[str], inches: float) -> None:
    """One metric against the budget."""
    control, yours, own_marks = _best_first(facts, metric), _yours(facts), marks(*order(facts))
    lines = {name: _line(facts, metric, name) for name in control}
    columns, scale = pruned_budgets(facts), _scale(facts)
    own = look(axis.figure.get_figwidth())
    ends, shown = [], [point for line in lines.values() for point in line[:, 1]]
    for place, (name, line) in enumerate(reversed(lines.items())):  # the best on top
        x, value, low, high = line.T
        if len(columns) == 1:  # dots and no lines: equal ones would hide each other
            x = x / beside(place, len(lines), _ALONE)
        if name not in loud and not control[name]:
            axis.plot(x, value, color=FAINT, lw=own.size)
            continue
        mark = own_marks[name]
        if not control[name]:
            axis.fill_between(x, low, high, color=mark.colour, alpha=0.08, lw=0)
            shown += [*low, *high]
        width = 2.4 if name in yours else 1.0 if control[name] else 1.6
        (drawn,) = axis.plot(x, value, lw=width * own.size, zorder=2.5, **mark.style(own.size))
        end = float(x[-1]), float(value[-1])
        ends.append(Name(name, *end, mark.colour, name in yours, drawn))
    faint = len(lines) - len(ends)
    margin = 1.08 if len(columns) > 1 else 1.08 * beside(1, 2, _ALONE)
    ends += _draw_unpruned(axis, facts, metric, columns[-1] / margin)
    shown += [name.y for name in ends]
    low, high = (0.0, scale) if min(shown) >= 0 and max(shown) <= scale else (-np.inf, np.inf)
    axis.set_ylim(limits(shown, _LEAST * scale, low, high))
    lower = metric in facts.get("lower_is_better", ())
    unit = better("percent" if scale == 100 else "share", lower)
    label(axis, metric, "share of visual tokens kept (log scale)", unit)
    counts_axis(axis, columns, [budget_text(budget) for budget in columns])
    axis.set_xlim(columns[0] * margin, columns[-1] / margin)
    note = "dashed: controls" + (f"; faint: {faint} more pruners" if faint else "")
    name_ends(axis, ends, inches, note)


def _line(facts: Facts, metric: str, name: str) -> NDArray[np.float64]:
    """[P, 4] budget, value, low and high, many tokens first; only where there is a figure."""
    points = [
        (row["budget"], *_scaled(row["figures"][metric], _scale(facts)))
        for row in facts["rows"]
        if row["label"] == name
        and row["budget"] in pruned_budgets(facts)
        and has_figure(row, metric)
    ]
    return np.array(sorted(points, reverse=True))


def _draw_unpruned(axis: Any, facts: Facts, metric: str, last: float) -> list[Name]:
    """A horizontal line and its interval; returns its name at the right end."""
    names = []
    for row in facts["rows"]:
        if row["label"] == UNPRUNED and has_figure(row, metric):
            value, low, high = _scaled(row["figures"][metric], _scale(facts))
            text = f"{UNPRUNED} {number_text(row['figures'][metric]['value'], facts['percent'])}"
            drawn = axis.axhline(value, color=INK, lw=1)
            axis.axhspan(low, high, color=INK, alpha=0.06, lw=0)
            names.append(Name(text, last, value, INK, drawn=drawn))
    return names


def _draw_dots(axis: Any, facts: Facts, metric: str, rows: list[Facts]) -> None:
    """One metric's differences to random."""
    scale, shown, own_marks = _scale(facts), [0.0], marks(*order(facts))
    size = look(axis.figure.get_figwidth()).size
    axis.axvline(0, color=INK, lw=0.8)
    for place, row in enumerate(rows):
        minus = row["figures"][metric]["minus_random"]
        value, low, high = _scaled(minus, scale)
        shown += [value, low, high]
        sure = excludes_zero(minus)
        mark = own_marks[row["label"]]
        axis.plot(
            [low, high], [place, place], color=mark.colour, lw=1.4 * size, alpha=1 if sure else 0.6
        )
        style = mark.style(size) | {"mfc": mark.colour if sure else "white", "ls": ""}
        axis.plot([value], [place], **style)
    name_rows(axis, [row["label"] for row in rows])
    for tick, row in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_color(GREY if row["control"] else INK)
        tick.set_fontweight("bold" if row.get("yours") else "normal")
    axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)  # the best on top
    axis.set_xlim(limits(shown, _LEAST * scale))
    unit = better("points" if scale == 100 else "share", metric in facts["lower_is_better"])
    title = f"{metric}, {budget_text(focus(facts))} of the tokens"
    label(axis, title, f"minus random, {unit}, 95% interval (full dot: without 0)", grid="x")


def _scale(facts: Facts) -> float:
    return 100.0 if facts["percent"] else 1.0


def _scaled(figure: Facts, scale: float) -> tuple[float, float, float]:
    """Value, low and high; without an interval the value thrice."""
    value = figure["value"]
    low, high = (value if figure[key] is None else figure[key] for key in ("low", "high"))
    return scale * value, scale * low, scale * high
