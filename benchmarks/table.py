"""The README's tables of measured figures, from benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ocvtp.pruners import list_pruners

RESULTS = Path(__file__).parent / "results"


def _row(what: str, figure: dict[str, Any], goal: str) -> str:
    spread = f"{figure['q25']:.2f} to {figure['q75']:.2f}"
    return f"| {what} | {figure['of_medians']:.2f} | {spread} | {goal} |"


def table() -> str:
    """Ratios with their quartiles, and the training step."""
    results = json.loads((RESULTS / "road-cpu.json").read_text())
    tower, pruner, attached = results["tower"], results["pruner"], results["attached"]
    step = results["training"]
    lines = [
        f"{results['device']}, {results['threads']} thread, torch {results['torch']}, transformers"
        f" {results['transformers']}.",
        "",
        "| ratio | median | quartiles | goal |",
        "|---|---|---|---|",
        _row("tower cut behind layer 9 / whole CLIP ViT-L/14-336", tower["cut / full"], "0.45"),
    ]
    for batch in ("B=1", "B=8"):
        what = f"encode + assign + select, K=64 of 576, {batch} / its bare matrix products"
        lines.append(_row(what, pruner[batch]["select / bare"], "1.3"))
    what = "tower + prefill, every token kept under a pruner / bare model (CLIP-L, 4 x 2048 LLM)"
    lines.append(_row(what, attached["keep all / bare"], "1.03"))
    for name in ("ocvtp K=64", "fastervlm K=64"):
        figure = attached[f"{name} / bare"]
        lines.append(_row(f"tower + pruner + prefill, {name} / bare model", figure, "-"))
    lines += [
        "",
        "A training step at LLaVA-1.5 size (tower on the fly, S = 64, fp32,"
        f" batch {step['batch']}): {step['images per second']:.2f} images/s,"
        f" {step['peak resident GiB']:.1f} GiB peak resident memory.",
    ]
    return "\n".join(lines) + "\n"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def select_table() -> str:
    """Milliseconds of every pruner's `select`, beside the tower's."""
    results = json.loads((RESULTS / "select-cpu.json").read_text())
    cases: dict[str, dict[str, float]] = results["ms"]
    lines = [
        f"{results['device']}, {results['threads']} thread, torch {results['torch']}; milliseconds,"
        " medians of one interleaved run.",
        "",
        f"| | {' | '.join(cases)} |",
        "|---|" + "---|" * len(cases),
    ]
    for name in dict.fromkeys(name for case in cases.values() for name in case):
        label = f"`{name}`" if name in list_pruners() else name
        figures = [_ms(case[name]) if name in case else "-" for case in cases.values()]
        lines.append(f"| {label} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"
