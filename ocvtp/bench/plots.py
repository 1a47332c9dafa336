"""Plots of a benchmark, from what results.json holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ocvtp.bench.summary import is_control
from ocvtp.bench.summary import label_of as _label
from ocvtp.evaluation.plots import order
from ocvtp.reporting.plain_text import better
from ocvtp.reporting.plot_style import (
    INK,
    MARKERS,
    WIDTH,
    Mark,
    Name,
    Row,
    bars_height,
    beside,
    canvas,
    counts_axis,
    draw_rows,
    height_for,
    label,
    limits,
    look,
    marks,
    name_ends,
    name_rows,
)

Facts = Mapping[str, Any]

NOTHING_IN_COMMON = (
    "the accuracies are of no pruner and budget that was timed; pass results.json of an `ocvtp"
    " evaluate` with the same --pruners and --num-keep."
)
_STAGES = {
    "tower": "#0072b2",
    "select": "#d55e00",
    "project": "#cc79a7",
    "model": "#56b4e9",
    "around": "#b0b0b0",
}
_TTFT = better("TTFT, ms", lower=True)
_IN_MS = ("median", "low", "high")
_LEAST = 0.05  # of an axis of times, over the largest; of one of shares


@dataclass(frozen=True)
class _Line:
    """The rows of one pruner, few tokens first, and how it is drawn."""

    name: str
    rows: Sequence[Facts]
    mark: Mark

    @property
    def yours(self) -> bool:
        return any(row.get("yours") for row in self.rows)

    def style(self, panel: Any) -> dict[str, Any]:
        size = look(panel.figure.get_figwidth()).size
        return {"lw": (2.2 if self.yours else 1.2) * size, **self.mark.style(size)}

    def end(self, x: float, y: float, drawn: Any) -> Name:
        return Name(self.name, x, y, self.mark.colour, self.yours, drawn)


def ttft(
    results: Facts,
    accuracy: Facts | None = None,
    width: float = WIDTH,
    like: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Figure:
    """TTFT against the tokens kept, or accuracy against TTFT; a panel a cell.

    Where all keep as many tokens there are no lines: every pruner has a row, the fastest on top.

    Args:
        results: of `ocvtp bench`.
        accuracy: results.json of `ocvtp evaluate`: its first metric is drawn, of the pruners and
            budgets that both have.
        width: inches.
        like: methods and controls in the order of their colours, of plots that stand beside this
            one; None for that of `accuracy`, or of the rows.

    Raises:
        ValueError: if they have none in common.
    """
    cells = [_on_one_clock(cell) for cell in results["cells"]]
    if accuracy is not None and not in_common(results, accuracy):
        raise ValueError(NOTHING_IN_COMMON)
    if like is None and accuracy is not None and _is_whole(accuracy):
        like = order(accuracy)
    own = _marks(cells, like or ((), ()))
    lines = [_lines(cell, own) for cell in cells]
    in_rows = [accuracy is None and len(_counts(one)) == 1 for one in lines]
    heights = [
        bars_height(len(one) + 1, 1.4, 0.24, width)
        if rows
        else height_for(["unpruned", *(line.name for line in one)], least=3.6, width=width)
        for one, rows in zip(lines, in_rows, strict=True)
    ]
    drawing, panels = canvas(heights, width)
    for panel, one, cell, height, rows in zip(panels, lines, cells, heights, in_rows, strict=True):
        if accuracy is not None:
            _against_accuracy(panel, one, cell, accuracy, height)
        elif rows:
            _at_one_count(panel, one, cell)
        else:
            _against_tokens(panel, one, cell, height)
    return drawing


def in_common(results: Facts, accuracy: Facts) -> bool:
    """Whether a pruner at a budget has both a time and an accuracy."""
    known = _accuracies(accuracy)
    return any(_shown(cell, known) for cell in results["cells"])


def narrowed(results: Facts, labels: Collection[str]) -> Facts:
    """What of the results is to be drawn: these lines, and the bare model."""
    cells = [
        {**cell, "rows": [cell["rows"][0], *(r for r in cell["rows"][1:] if _label(r) in labels)]}
        for cell in results["cells"]
    ]
    return {**results, "cells": cells}


def stages(results: Facts, width: float = WIDTH) -> Figure:
    """The time to the first token, cut into stages; a panel a cell, of so many inches."""
    cells = [_on_one_clock(cell) for cell in results["cells"]]
    heights = [bars_height(len(cell["rows"]), 1.4, 0.24, width) for cell in cells]
    drawing, panels = canvas(heights, width)
    for panel, cell in zip(panels, cells, strict=True):
        rows = cell["rows"]
        left = [0.0] * len(rows)
        for name, colour in _STAGES.items():
            times = [_stage(row, name) for row in rows]
            panel.barh(range(len(rows)), times, left=left, color=colour, label=name, height=0.72)
            left = [before + time for before, time in zip(left, times, strict=True)]
        name_rows(panel, [row["key"] for row in rows])
        for tick, row in zip(panel.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if row.get("yours") else "normal")
        panel.set_ylim(len(rows) - 0.4, -0.6)  # the bare model on top
        x = better("ms to the first token, medians of the stages", lower=True)
        label(panel, _title(cell), x, grid="x")
    handles, labels = panels[0].get_legend_handles_labels()
    own = look(width)
    drawing.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=own.text,
        frameon=False, columnspacing=2 * own.size, handlelength=2 * own.size,
        handletextpad=0.8 * own.size,
    )  # fmt: skip
    return drawing


def _against_tokens(panel: Any, lines: Sequence[_Line], cell: Facts, inches: float) -> None:
    """A line a pruner, with intervals, and the bare model's TTFT; dots of a budget side by side."""
    counts = _counts(lines)
    gaps = np.diff(np.log(counts)) if len(counts) > 1 else [np.log(2)]
    bare = cell["rows"][0]["figures"]["ttft"]
    times = [[_times(row) for row in line.rows] for line in lines]
    shown = [time for own in (*times, [_times(cell["rows"][0])]) for three in own for time in three]
    panel.set_ylim(limits(shown, _LEAST * max(shown), floor=0.0))
    ends = []
    for place, (line, own) in enumerate(zip(lines, times, strict=True)):
        middle, low, high = np.array(own).T
        spread = [np.maximum(middle - low, 0), np.maximum(high - middle, 0)]
        x = [_tokens(row) * beside(place, len(lines), 0.6 * min(gaps)) for row in line.rows]
        drawn = panel.errorbar(x, middle, yerr=spread, capsize=2, **line.style(panel))
        ends.append(line.end(x[-1], float(middle[-1]), drawn.lines[0]))
    level = panel.axhline(bare["median"], color=INK, lw=1, ls=":")
    panel.axhspan(bare["low"], bare["high"], color=INK, alpha=0.08, lw=0)
    label(panel, _title(cell), "visual tokens kept of an image (log scale)", _TTFT, grid="both")
    if counts:
        counts_axis(panel, counts, [f"{count:.4g}" for count in counts])
        margin = float(np.exp(0.5 * min(gaps)))
        panel.set_xlim(counts[0] / margin, counts[-1] * margin)
    ends.append(Name("unpruned", panel.get_xlim()[1], bare["median"], INK, drawn=level))
    name_ends(panel, ends, inches)


def _at_one_count(panel: Any, lines: Sequence[_Line], cell: Facts) -> None:
    """A row a pruner, with intervals, the bare model's on top."""
    bare = _times(cell["rows"][0])
    own = [Row(line.name, *_times(line.rows[0]), line.mark, line.yours) for line in lines]
    own.sort(key=lambda row: row.value)
    rows = [Row("unpruned", *bare, Mark(INK, MARKERS[0])), *own]
    draw_rows(panel, rows)
    panel.axvline(bare[0], color=INK, lw=1, ls=":", zorder=1)
    panel.axvspan(*bare[1:], color=INK, alpha=0.08, lw=0)
    shown = [end for row in rows for end in (row.value, row.low, row.high)]
    panel.set_xlim(limits(shown, _LEAST * max(shown), floor=0.0))
    (count,) = _counts(lines)
    label(panel, f"{_title(cell)}, {count:.4g} visual tokens of an image", _TTFT, grid="x")


def _counts(lines: Sequence[_Line]) -> list[float]:
    """Tokens kept of an image, few first."""
    return sorted({_tokens(row) for line in lines for row in line.rows})


def _times(row: Facts) -> tuple[float, float, float]:
    """Median, low and high, in ms."""
    figure = row["figures"]["ttft"]
    return (figure["median"], *(figure.get(key, figure["median"]) for key in ("low", "high")))


def _against_accuracy(
    panel: Any, lines: Sequence[_Line], cell: Facts, accuracy: Facts, inches: float
) -> None:
    """A line a pruner, of the budgets whose accuracy is known."""
    known, metric = _accuracies(accuracy), accuracy["metrics"][0]
    scale = 100.0 if accuracy.get("percent") else 1.0
    ends, points = [], list[tuple[float, float]]()
    bare = cell["rows"][0]
    if (value := known.get((bare["label"], None))) is not None:
        points.append((bare["figures"]["ttft"]["median"], scale * value))
        (star,) = panel.plot(*points[0], "*", color=INK, ms=9)
        ends.append(Name(bare["label"], *points[0], INK, drawn=star))
    for line in lines:
        own = [
            (row["figures"]["ttft"]["median"], scale * known[row["label"], row["num_keep"]])
            for row in line.rows
            if (row["label"], row["num_keep"]) in known
        ]
        if own:
            (drawn,) = panel.plot(*zip(*own, strict=True), **line.style(panel))
            ends.append(line.end(*own[-1], drawn))
        points += own
    times, values = zip(*points, strict=True) if points else ([0.0, 1.0], [0.0, 1.0])
    bounded = min(values) >= 0 and max(values) <= scale
    floor, ceiling = (0.0, scale) if bounded else (-np.inf, np.inf)
    panel.set_xlim(limits(times, _LEAST * max(times), floor=0.0))
    panel.set_ylim(limits(values, _LEAST * scale, floor, ceiling))
    unit = f"{metric} of {accuracy['task']}" + (", percent" if scale > 1 else "")
    y = better(unit, metric in accuracy.get("lower_is_better", ()))
    label(panel, _title(cell), _TTFT, y, grid="both")
    name_ends(panel, ends, inches)


def _on_one_clock(cell: Facts) -> Facts:
    """A cell whose rows of later runs take the share of the unpruned time that they took there."""
    bare = cell["rows"][0]["figures"]["ttft"]["median"]
    rows = []
    for row in cell["rows"]:
        if (there := row.get("beside")) is not None:
            scale = bare / there["ttft"]
            known = row["figures"]["ttft"]
            ttft = known | {key: scale * known[key] for key in _IN_MS if key in known}
            stages = {name: scale * time for name, time in row["stages"].items()}
            row = row | {"figures": row["figures"] | {"ttft": ttft}, "stages": stages}
        rows.append(row)
    return {**cell, "rows": rows}


def _marks(cells: Sequence[Facts], like: tuple[Sequence[str], Sequence[str]]) -> dict[str, Mark]:
    """Of all lines, those of `like` first."""
    rows = [row for cell in cells for row in cell["rows"] if row["kept"] is not None]
    rows.sort(key=lambda row: bool(row["changed"]))  # what was asked for comes first
    methods = [_label(row) for row in rows if not is_control(row)]
    controls = [_label(row) for row in rows if is_control(row)]
    return marks([*like[0], *methods], [*like[1], *controls])


def _is_whole(accuracy: Facts) -> bool:
    """Whether it has what plots of an evaluation read, not values alone."""
    return all({"budget", "control"} <= row.keys() for row in accuracy["rows"])


def _lines(cell: Facts, own: Mapping[str, Mark]) -> list[_Line]:
    pruned = [row for row in cell["rows"] if row["kept"] is not None]
    found: dict[str, list[Facts]] = {}
    for row in pruned:
        found.setdefault(_label(row), []).append(row)
    return [_Line(name, sorted(rows, key=_tokens), own[name]) for name, rows in found.items()]


def _accuracies(accuracy: Facts) -> dict[tuple[str, int | None], float]:
    """By label and tokens kept."""
    metric = accuracy["metrics"][0]
    return {
        (row["label"], row["num_keep"]): row["figures"][metric]["value"]
        for row in accuracy["rows"]
        if row["figures"].get(metric, {}).get("value") is not None
    }


def _shown(cell: Facts, known: Mapping[Any, float]) -> bool:
    return any(
        (row["label"], row["num_keep"]) in known for row in cell["rows"] if row["kept"] is not None
    )


def _tokens(row: Facts) -> float:
    """The budget, or what is kept of the first image."""
    if row["num_keep"] is not None:
        return float(row["num_keep"])
    layers = row["kept"]["layers"]
    kept = layers[-1] if layers else row["kept"]
    return float(kept["visual_tokens_kept"][0])


def _stage(row: Facts, name: str) -> float:
    found = row["stages"]
    return float(found["prefill"] - found["around"] if name == "model" else found[name])


def _title(cell: Facts) -> str:
    images = f", {cell['images_per_prompt']} images" if cell["images_per_prompt"] > 1 else ""
    return f"batch {cell['batch_size']}{images}, {cell['text_tokens']} text tokens"
