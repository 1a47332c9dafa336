"""report.md and plots of the cells that `benchmarks.gpu` has written so far."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ocvtp.bench.report import table
from ocvtp.reporting.figure_files import save_figure
from ocvtp.reporting.files import replacing
from ocvtp.reporting.plot_style import COLOURS, canvas, label, shortened

Facts = Mapping[str, Any]

PREFILL_GOAL, SHARE_GOAL = 0.85, 0.03
IMAGES_GOAL, NEXT_GOAL = 1000, 4.0
_TIMES = {
    "ttft ms": "TTFT, ms", "ttft speed-up": "TTFT speed-up", "prefill ms": "prefill, ms",
    "prefill speed-up": "prefill speed-up", "prefill speed-up / possible": "of the possible",
    "select ms": "select, ms", "select / TTFT": "select / TTFT", "peak GiB": "peak, GiB",
    "prompts per second to the first token": "prompts a second",
}  # fmt: skip
_STEPS = {
    "objective": "objective", "batch": "batch", "dtype": "dtype",
    "images per second": "images a second",
    "images per second from extracted features": "from extracted features",
}  # fmt: skip


def write_report(
    facts: Facts, cells: Sequence[Facts], folder: Path, draw: bool = True
) -> list[Path]:
    """Write results.json, report.md and plots.

    Args:
        facts: what the figures depend on, and what was `left out`.
        cells: done and failed, in the order of the plan.
        folder: made where absent.
        draw: whether plots are drawn, too.
    """
    whole = {**facts, "cells": list(cells)}
    texts = {
        "results.json": json.dumps(whole, indent=1) + "\n",
        "report.md": markdown(facts, cells),
    }
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text)
    paths = [folder / name for name in texts]
    if draw and (timed := [cell for cell in cells if _rows(cell)]):
        paths.append(save_figure(drawing(timed), folder / "ttft.png", dpi=120))
    return paths


def _rows(cell: Facts) -> list[Facts]:
    rows: list[Facts] = cell.get("found", {}).get("rows", [])
    return rows


def goals(cells: Sequence[Facts]) -> Iterator[str]:
    """What is asked of the figures, one by one."""
    for cell in cells:
        found = cell.get("found", {})
        for row in _rows(cell):
            key = f"{cell['cell']}, {row['key']}"
            if found["batch"] == 8 and "prefill speed-up / possible" in row:
                reached = row["prefill speed-up / possible"]
                yield _goal(key, "prefill speed-up / possible", reached, PREFILL_GOAL)
            if found["batch"] == 8 and row["label"] == "ocvtp":
                yield _goal(key, "select / TTFT", row["select / TTFT"], SHARE_GOAL, most=True)
            if cell["cell"] == "next-b1" and row["key"] == "ocvtp K=160":
                yield _goal(key, "TTFT speed-up", row["ttft speed-up"], NEXT_GOAL)
        if (speed := found.get("images per second from extracted features")) is not None:
            yield _goal(cell["cell"], "images a second, extracted features", speed, IMAGES_GOAL)


def _goal(where: str, what: str, value: float, goal: float, most: bool = False) -> str:
    met, sign = (value <= goal, "<=") if most else (value >= goal, ">=")
    return f"- {'met' if met else 'NOT met'}: {where}, {what} {value:,.3g} ({sign} {goal:,g})"


def markdown(facts: Facts, cells: Sequence[Facts]) -> str:
    """The whole report."""
    plain = {key: value for key, value in facts.items() if key != "left out"}
    parts = [f"# {facts['device']}", ", ".join(f"{key} {value}" for key, value in plain.items())]
    parts.append("Random weights: times are true, answers mean nothing. Two tokens are answered.")
    if facts["left out"]:
        parts.append(f"Unmeasured, for want of time: {', '.join(facts['left out'])}.")
    if lines := list(goals(cells)):
        parts += ["## Goals", "\n".join(lines)]
    for cell in cells:
        parts += [f"## {cell['cell']}", f"{cell['what']}; {cell['seconds']} s."]
        if cell["state"] == "failed":
            parts.append(f"Failed: `{cell['error']}`")
        else:
            parts += list(_tables(cell["found"]))
    return "\n\n".join(parts) + "\n"


def _tables(found: Facts) -> Iterator[str]:
    if "rows" in found:
        names = [name for name in _TIMES if any(name in row for row in found["rows"])]
        rows = [[row["key"], *(_text(row.get(name)) for name in names)] for row in found["rows"]]
        yield table(["", *(_TIMES[name] for name in names)], rows)
        if found["unfit"]:
            yield "\n".join(f"- left out: {key}: {why}" for key, why in found["unfit"].items())
    elif "images per second" in found:
        yield table(list(_STEPS.values()), [[_text(found[name]) for name in _STEPS]])
        rest = {name: value for name, value in found.items() if name not in _STEPS}
        yield "\n".join(f"- {name}: {value}" for name, value in rest.items())
    else:
        rows = [(name, value) for group in found.values() for name, value in _items(group)]
        yield "\n".join(f"- {name}: {value}" if name else f"- {value}" for name, value in rows)


def _items(group: Any) -> list[tuple[str, str]]:
    if not isinstance(group, Mapping):
        return [("", str(group))]
    rows = {name: ", ".join(f"{k} {v}" for k, v in facts.items()) for name, facts in group.items()}
    return [(name, said or "nothing") for name, said in rows.items()]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


def drawing(cells: Sequence[Facts]) -> Any:
    """How much sooner the first token comes, a panel a cell."""
    shown = [[row for row in _rows(cell) if "ttft speed-up" in row][1:] for cell in cells]
    made, panels = canvas([1.2 + 0.24 * max(1, len(rows)) for rows in shown])
    for panel, cell, rows in zip(panels, cells, shown, strict=True):
        speed = [row["ttft speed-up"] for row in rows]
        low, high = zip(*(row["ttft speed-up, interval"] for row in rows), strict=True)
        spread = [
            [max(0.0, value - least) for value, least in zip(speed, low, strict=True)],
            [max(0.0, most - value) for value, most in zip(speed, high, strict=True)],
        ]
        panel.barh(range(len(rows)), speed, xerr=spread, color=COLOURS[0], height=0.7)
        panel.set_yticks(range(len(rows)), [shortened(row["key"]) for row in rows])
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.axvline(1, color="black", lw=0.8)
        label(panel, cell["what"], "TTFT of the bare model / TTFT", grid="x")
    return made
