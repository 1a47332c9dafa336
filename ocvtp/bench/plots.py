"""Plots of a benchmark, from what results.json holds.

Drawn on an Agg canvas of their own: nothing touches pyplot or matplotlib's global state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

Facts = Mapping[str, Any]

NOTHING_IN_COMMON = (
    "the accuracies are of no pruner and budget that was timed; pass results.json of an `ocvtp"
    " evaluate` with the same --pruners and --num-keep."
)
_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#8c6d1f",
)  # fmt: skip
"""Told apart by the colour-blind too: Okabe and Ito 2008, and two more."""
_STAGES = {
    "tower": "#0072b2",
    "select": "#d55e00",
    "project": "#cc79a7",
    "model": "#56b4e9",
    "around": "#b0b0b0",
}
_INK = "#222222"
_MAX_COLUMNS = 3


def ttft(results: Facts, accuracy: Facts | None = None) -> Figure:
    """TTFT against the tokens kept, or accuracy against TTFT; a panel a cell.

    Args:
        results: of `ocvtp bench`.
        accuracy: results.json of `ocvtp evaluate`: its first metric is drawn, of the pruners and
            budgets that both have.

    Raises:
        ValueError: if they have none in common.
    """
    cells = results["cells"]
    drawing, panels = _canvas(len(cells), width=5.6, height=4.2)
    if accuracy is not None and not any(_shown(cell, _accuracies(accuracy)) for cell in cells):
        raise ValueError(NOTHING_IN_COMMON)
    for panel, cell in zip(panels, cells, strict=True):
        if accuracy is None:
            _against_tokens(panel, cell)
        else:
            _against_accuracy(panel, cell, accuracy)
        panel.set_title(_title(cell), fontsize=9, loc="left")
        panel.legend(fontsize=7.5, frameon=False)
        panel.grid(color="#e4e4e4", lw=0.6)
    return drawing


def stages(results: Facts) -> Figure:
    """The time to the first token, cut into stages; a panel a cell."""
    cells = results["cells"]
    most = max(len(cell["rows"]) for cell in cells)
    drawing, panels = _canvas(len(cells), width=6.2, height=1.4 + 0.24 * most)
    for panel, cell in zip(panels, cells, strict=True):
        rows = cell["rows"]
        left = [0.0] * len(rows)
        for name, colour in _STAGES.items():
            times = [_stage(row, name) for row in rows]
            panel.barh(range(len(rows)), times, left=left, color=colour, label=name, height=0.72)
            left = [before + time for before, time in zip(left, times, strict=True)]
        panel.set_yticks(range(len(rows)), [row["key"] for row in rows], fontsize=8)
        panel.set_ylim(len(rows) - 0.4, -0.6)  # the bare model on top
        panel.set_xlabel("ms to the first token (medians of the stages)", fontsize=9)
        panel.set_title(_title(cell), fontsize=9, loc="left")
        panel.grid(axis="x", color="#e4e4e4", lw=0.6)
        panel.set_axisbelow(True)
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8,
                   frameon=False)  # fmt: skip
    return drawing


def _against_tokens(panel: Any, cell: Facts) -> None:
    """A line a pruner, with intervals, and the bare model's TTFT."""
    bare = cell["rows"][0]["figures"]["ttft"]
    panel.axhline(bare["median"], color=_INK, lw=1, ls=":")
    panel.axhspan(bare["low"], bare["high"], color=_INK, alpha=0.08, lw=0)
    place = (0.99, bare["median"])
    panel.annotate("unpruned", place, xycoords=("axes fraction", "data"), ha="right",
                   xytext=(0, 3), textcoords="offset points", fontsize=8)  # fmt: skip
    for rows, style in _lines(cell):
        figures = [row["figures"]["ttft"] for row in rows]
        middle = [figure["median"] for figure in figures]
        spread = [
            [max(figure["median"] - figure["low"], 0) for figure in figures],
            [max(figure["high"] - figure["median"], 0) for figure in figures],
        ]
        panel.errorbar([_tokens(row) for row in rows], middle, yerr=spread, capsize=2, **style)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("visual tokens kept of an image", fontsize=9)
    panel.set_ylabel("TTFT, ms", fontsize=9)


def _against_accuracy(panel: Any, cell: Facts, accuracy: Facts) -> None:
    """A line a pruner, of the budgets whose accuracy is known."""
    known = _accuracies(accuracy)
    for row in cell["rows"]:
        if row["kept"] is None and (value := known.get((row["label"], None))) is not None:
            time = row["figures"]["ttft"]["median"]
            panel.plot([time], [value], "*", color=_INK, ms=9, label=row["label"])
    for rows, style in _lines(cell):
        points = [
            (row["figures"]["ttft"]["median"], known[row["label"], row["num_keep"]])
            for row in rows
            if (row["label"], row["num_keep"]) in known
        ]
        if points:
            panel.plot(*zip(*points, strict=True), **style)
    panel.set_xlabel("TTFT, ms", fontsize=9)
    panel.set_ylabel(f"{accuracy['metrics'][0]} of {accuracy['task']}", fontsize=9)


def _lines(cell: Facts) -> Iterator[tuple[list[Facts], dict[str, Any]]]:
    """The rows of every pruner, few tokens first, and how to draw them."""
    pruned = [row for row in cell["rows"] if row["kept"] is not None]
    labels = list(dict.fromkeys(_label(row) for row in pruned))
    for number, label in enumerate(labels):
        rows = sorted((row for row in pruned if _label(row) == label), key=_tokens)
        turn, colour = divmod(number, len(_COLOURS))
        yield (
            rows,
            {
                "color": _COLOURS[colour],
                "marker": "os^D"[turn % 4],
                "ms": 4,
                "lw": 1.2,
                "label": label,
            },
        )


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


def _canvas(panels: int, width: float, height: float) -> tuple[Figure, Sequence[Any]]:
    """A figure of panels in rows; inches of each."""
    columns = min(panels, _MAX_COLUMNS)
    rows = -(-panels // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    drawing = Figure(figsize=(columns * width, rows * height), layout=layout)
    FigureCanvasAgg(drawing)
    axes = list(drawing.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=_INK)
    return drawing, axes[:panels]
