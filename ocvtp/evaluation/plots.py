"""Plots of an evaluation, from what results.json holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ocvtp.evaluation.labels import SHUFFLED, UNPRUNED
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
from ocvtp.reporting.plain_text import better
from ocvtp.reporting.plot_style import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    WIDTH,
    Mark,
    Name,
    Row,
    bars_height,
    canvas,
    counts_axis,
    draw_rows,
    height_for,
    label,
    limits,
    look,
    marks,
    name_ends,
)
from ocvtp.reporting.plot_style import spread as spread

_WHOLE = (UNPRUNED, SHUFFLED)
_LEAST = 0.1  # of an axis of shares
_MARGIN = 1.08  # factor of budgets beyond the first and the last
_AROUND, _EACH = 1.2, 0.2  # inches of a panel of rows, and of a row


def accuracy(facts: Facts, width: float = WIDTH) -> Figure | None:
    """Every metric against the share of tokens kept, a panel each; fewer tokens to the right.

    Methods of the user's own and the best others at the smallest budget but one have colours and
    intervals; controls are dashed, the others faint. Of a single budget there are no lines: every
    pruner has a row, best on top.

    Args:
        facts: see `ocvtp.evaluation.report.results`.
        width: inches.

    Returns:
        None where no budget is below 1.
    """
    if not pruned_budgets(facts):
        return None
    if len(pruned_budgets(facts)) == 1:
        return _accuracy_rows(facts, width)
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
    drawing, panels = _row_panels([len(shown) for shown in rows.values()], width)
    for panel, (metric, shown) in zip(panels, rows.items(), strict=True):
        _draw_differences(panel, facts, metric, shown)
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


def _accuracy_rows(facts: Facts, width: float) -> Figure:
    """Every metric at the only budget, a panel each; the unpruned model on top."""
    (budget,) = pruned_budgets(facts)
    rows = {
        metric: [row for row in ranked(facts, metric, budget) if has_figure(row, metric)]
        for metric in facts["metrics"]
    }
    whole = [row for row in facts["rows"] if row["label"] == UNPRUNED]
    drawing, panels = _row_panels([len(whole) + len(shown) for shown in rows.values()], width)
    for panel, (metric, shown) in zip(panels, rows.items(), strict=True):
        _draw_values(panel, facts, metric, [r for r in whole if has_figure(r, metric)], shown)
    return drawing


def _row_panels(counts: Sequence[int], width: float) -> tuple[Figure, list[Any]]:
    return canvas([bars_height(max(n, 1), _AROUND, _EACH, width) for n in counts], width)


def _draw_values(
    axis: Any, facts: Facts, metric: str, whole: Sequence[Facts], rows: Sequence[Facts]
) -> None:
    """One metric at the only budget."""
    scale, own_marks = _scale(facts), marks(*order(facts)) | {UNPRUNED: Mark(INK, MARKERS[0])}
    drawn = [_drawn_row(row, row["figures"][metric], scale, own_marks) for row in (*whole, *rows)]
    draw_rows(axis, drawn)
    for row in drawn[: len(whole)]:
        axis.axvline(row.value, color=INK, lw=1, zorder=1)
        axis.axvspan(row.low, row.high, color=INK, alpha=0.06, lw=0)
    shown = [end for row in drawn for end in (row.value, row.low, row.high)] or [0.0]
    low, high = (0.0, scale) if min(shown) >= 0 and max(shown) <= scale else (-np.inf, np.inf)
    axis.set_xlim(limits(shown, _LEAST * scale, low, high))
    unit = better("percent" if scale == 100 else "share", metric in facts["lower_is_better"])
    grey = "; grey: controls" if any(row.mark.control for row in drawn) else ""
    title = f"{metric}, {budget_text(focus(facts))} of the tokens"
    label(axis, title, f"{unit}, 95% interval{grey}", grid="x")


def _drawn_row(row: Facts, figure: Facts, scale: float, own: Mapping[str, Mark]) -> Row:
    return Row(row["label"], *_scaled(figure, scale), own[row["label"]], bool(row.get("yours")))


def _draw_lines(axis: Any, facts: Facts, metric: str, loud: Collection[str], inches: float) -> None:
    """One metric against the budget."""
    control, yours, own_marks = _best_first(facts, metric), _yours(facts), marks(*order(facts))
    lines = {name: _line(facts, metric, name) for name in control}
    columns, scale = pruned_budgets(facts), _scale(facts)
    own = look(axis.figure.get_figwidth())
    ends, shown = [], [point for line in lines.values() for point in line[:, 1]]
    for name, line in reversed(lines.items()):  # the best on top
        x, value, low, high = line.T
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
    ends += _draw_unpruned(axis, facts, metric, columns[-1] / _MARGIN)
    shown += [name.y for name in ends]
    low, high = (0.0, scale) if min(shown) >= 0 and max(shown) <= scale else (-np.inf, np.inf)
    axis.set_ylim(limits(shown, _LEAST * scale, low, high))
    lower = metric in facts.get("lower_is_better", ())
    unit = better("percent" if scale == 100 else "share", lower)
    label(axis, metric, "share of visual tokens kept (log scale)", unit)
    counts_axis(axis, columns, [budget_text(budget) for budget in columns])
    axis.set_xlim(columns[0] * _MARGIN, columns[-1] / _MARGIN)
    notes = ["dashed: controls"] if any(control.values()) else []
    notes += [f"faint: {faint} more pruner{'s' * (faint > 1)}"] if faint else []
    name_ends(axis, ends, inches, "; ".join(notes))


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


def _draw_differences(axis: Any, facts: Facts, metric: str, rows: Sequence[Facts]) -> None:
    """One metric's differences to random."""
    scale, own_marks = _scale(facts), marks(*order(facts))
    minus = [row["figures"][metric]["minus_random"] for row in rows]
    drawn = [
        replace(_drawn_row(row, one, scale, own_marks), full=excludes_zero(one))
        for row, one in zip(rows, minus, strict=True)
    ]
    axis.axvline(0, color=INK, lw=0.8)
    draw_rows(axis, drawn)
    shown = [end for row in drawn for end in (row.value, row.low, row.high)]
    axis.set_xlim(limits([0.0, *shown], _LEAST * scale))
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
