"""Plots of a benchmark, from what results.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ocvtp.reporting.plot_style import (
    COLOURS,
    INK,
    MARKERS,
    Name,
    beside,
    better,
    canvas,
    counts_axis,
    height_for,
    label,
    limits,
    name_ends,
    shortened,
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
    number: int
    of: int

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def marker(self) -> str:
        return MARKERS[(self.number + self.number // len(COLOURS)) % len(MARKERS)]

    @property
    def yours(self) -> bool:
        return any(row.get("yours") for row in self.rows)

    @property
    def style(self) -> dict[str, Any]:
        width = 2.2 if self.yours else 1.2
        return {"color": self.colour, "marker": self.marker, "ms": 5, "lw": width}

    def end(self, x: float, y: float) -> Name:
        return Name(self.name, x, y, self.colour, self.yours)


def ttft(results: Facts, accuracy: Facts | None = None) -> Figure:
    """TTFT against the tokens kept, or accuracy against TTFT; a panel a cell.

    Args:
        results: of `ocvtp bench`.
        accuracy: results.json of `ocvtp evaluate`: its first metric is drawn, of the pruners and
            budgets that both have.

    Raises:
        ValueError: if they have none in common.
    """
    cells = [_on_one_clock(cell) for cell in results["cells"]]
    if accuracy is not None and not any(_shown(cell, _accuracies(accuracy)) for cell in cells):
        raise ValueError(NOTHING_IN_COMMON)
    heights = [height_for(len(_lines(cell)) + 1, least=3.6) for cell in cells]
    drawing, panels = canvas(heights)
    for panel, cell, height in zip(panels, cells, heights, strict=True):
        if accuracy is None:
            _against_tokens(panel, cell, height)
        else:
            _against_accuracy(panel, cell, accuracy, height)
    return drawing


def stages(results: Facts) -> Figure:
    """The time to the first token, cut into stages; a panel a cell."""
    cells = [_on_one_clock(cell) for cell in results["cells"]]
    drawing, panels = canvas([1.4 + 0.24 * len(cell["rows"]) for cell in cells])
    for panel, cell in zip(panels, cells, strict=True):
        rows = cell["rows"]
        left = [0.0] * len(rows)
        for name, colour in _STAGES.items():
            times = [_stage(row, name) for row in rows]
            panel.barh(range(len(rows)), times, left=left, color=colour, label=name, height=0.72)
            left = [before + time for before, time in zip(left, times, strict=True)]
        panel.set_yticks(range(len(rows)), [shortened(row["key"]) for row in rows])
        for tick, row in zip(panel.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if row.get("yours") else "normal")
        panel.set_ylim(len(rows) - 0.4, -0.6)  # the bare model on top
        x = better("ms to the first token, medians of the stages", lower=True)
        label(panel, _title(cell), x, grid="x")
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8,
                   frameon=False)  # fmt: skip
    return drawing


def _against_tokens(panel: Any, cell: Facts, inches: float) -> None:
    """A line a pruner, with intervals, and the bare model's TTFT; dots of a budget side by side."""
    lines = _lines(cell)
    counts = sorted({_tokens(row) for line in lines for row in line.rows})
    gaps = np.diff(np.log(counts)) if len(counts) > 1 else [np.log(2)]
    ends, shown = [], list[float]()
    for line in lines:
        figures = [row["figures"]["ttft"] for row in line.rows]
        middle = [figure["median"] for figure in figures]
        low, high = ([figure.get(key, figure["median"]) for figure in figures]
                     for key in ("low", "high"))  # fmt: skip
        spread = [np.maximum(np.subtract(middle, low), 0), np.maximum(np.subtract(high, middle), 0)]
        x = [_tokens(row) * beside(line.number, line.of, 0.6 * min(gaps)) for row in line.rows]
        panel.errorbar(x, middle, yerr=spread, capsize=2, **line.style)
        ends.append(line.end(x[-1], middle[-1]))
        shown += [*middle, *low, *high]
    bare = cell["rows"][0]["figures"]["ttft"]
    panel.axhline(bare["median"], color=INK, lw=1, ls=":")
    panel.axhspan(bare["low"], bare["high"], color=INK, alpha=0.08, lw=0)
    shown += [bare["low"], bare["high"]]
    panel.set_ylim(limits(shown, _LEAST * max(shown), floor=0.0))
    label(panel, _title(cell), "visual tokens kept of an image (log scale)", _TTFT, grid="both")
    if counts:
        counts_axis(panel, counts, [f"{count:.4g}" for count in counts])
        margin = float(np.exp(0.5 * min(gaps)))
        panel.set_xlim(counts[0] / margin, counts[-1] * margin)
    ends.append(Name("unpruned", panel.get_xlim()[1], bare["median"], INK))
    name_ends(panel, ends, inches)


def _against_accuracy(panel: Any, cell: Facts, accuracy: Facts, inches: float) -> None:
    """A line a pruner, of the budgets whose accuracy is known."""
    known, metric = _accuracies(accuracy), accuracy["metrics"][0]
    scale = 100.0 if accuracy.get("percent") else 1.0
    ends, points = [], list[tuple[float, float]]()
    bare = cell["rows"][0]
    if (value := known.get((bare["label"], None))) is not None:
        points.append((bare["figures"]["ttft"]["median"], scale * value))
        panel.plot(*points[0], "*", color=INK, ms=9)
        ends.append(Name(bare["label"], *points[0], INK))
    for line in _lines(cell):
        own = [
            (row["figures"]["ttft"]["median"], scale * known[row["label"], row["num_keep"]])
            for row in line.rows
            if (row["label"], row["num_keep"]) in known
        ]
        if own:
            panel.plot(*zip(*own, strict=True), **line.style)
            ends.append(line.end(*own[-1]))
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


def _lines(cell: Facts) -> list[_Line]:
    pruned = [row for row in cell["rows"] if row["kept"] is not None]
    found: dict[str, list[Facts]] = {}
    for row in pruned:
        found.setdefault(_label(row), []).append(row)
    return [
        _Line(name, sorted(rows, key=_tokens), number, len(found))
        for number, (name, rows) in enumerate(found.items())
    ]


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


def _label(row: Facts) -> str:
    """Which line a row is a point of."""
    changed = f" [{row['changed']}]" if row["changed"] else ""
    return f"{row['label']}{changed}"


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
