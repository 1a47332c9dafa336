"""Tables of accuracies on the demo VLM, from docs/results."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import wrap
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "demo-vlm" / "results.json"
CHOSEN = {
    "ocvtp": "few tokens on crowded images, and can train for your tower",
    "zspaprune": "no training, one question an image (it reads the prompt)",
    "todre": "no training, any question (a tower with a CLS: CLIP, InternVL)",
    "divprune": "no training, any model, vLLM too (it reads projected tokens only)",
    "tome": "a faster vision tower too, at a quarter of the tokens or more (LLaVA family)",
}
CHOSEN_KEEP = (36, 16)


def accuracy_table() -> str:
    """A row a pruner, a column a level and a budget; best at the smallest budget but one first."""
    facts = json.loads(RESULTS.read_text())
    metrics = facts["metrics"]
    shares = sorted({row["budget"] for row in facts["rows"] if row["budget"]} - {1.0}, reverse=True)
    rows: dict[str, dict[float, Any]] = {}
    for row in facts["rows"]:
        if row["budget"] != 1.0:
            rows.setdefault(row["label"], {})[row["budget"]] = row
    order = sorted(rows, key=lambda label: -_value(rows[label].get(shares[-2]), metrics[-1]))
    columns = [f"{metric.partition('/')[0]} {100 * s:.3g}%" for metric in metrics for s in shares]
    lines = [
        *_caption(facts),
        "",
        f"| pruner | {' | '.join(columns)} |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for label in order:
        cells = [_cell(rows[label].get(s), metric) for metric in metrics for s in shares]
        lines.append(f"| {_name(rows[label])} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def choosing_table() -> str:
    """Five pruners by what they ask for, with what they reach at two budgets."""
    facts = json.loads(RESULTS.read_text())
    metrics = facts["metrics"]
    found = {(row["label"], row["num_keep"]): row for row in facts["rows"]}
    tokens = round(found["unpruned", None]["visual_tokens"])
    columns = [f"{metric.partition('/')[0]}, {keep}" for keep in CHOSEN_KEEP for metric in metrics]
    lines = [f"| you want | pruner | {' | '.join(columns)} |", "|---|---" + "|---:" * 4 + "|"]
    for label, wanted in CHOSEN.items():
        rows = [(found[label, keep], metric) for keep in CHOSEN_KEEP for metric in metrics]
        cells = [_cell(row, metric) for row, metric in rows]
        lines.append(f"| {wanted} | `{label}` | {' | '.join(cells)} |")
    images = found["unpruned", None]["figures"][metrics[0]]["images"]
    whole, random = (
        " and ".join(_percent(found[key]["figures"][m]["value"]) for m in metrics)
        for key in (("unpruned", None), ("random", CHOSEN_KEEP[-1]))
    )
    levels = " and ".join(metric.partition("/")[0] for metric in metrics)
    note = (
        f"Percent of right answers of the demo VLM on {images} drawn test scenes of each level"
        f" ({levels}) with {' and '.join(map(str, CHOSEN_KEEP))} of {tokens} visual tokens."
        f" Unpruned: {whole}; {CHOSEN_KEEP[-1]} random tokens: {random}. A star: the 95%"
        " interval of the difference to random excludes 0. `ocvtp` was trained on such scenes"
        " (3 seeds); the others were not trained."
    )
    return "\n".join([*lines, "", *wrap(note, width=120), ""])


def _caption(facts: dict[str, Any]) -> list[str]:
    whole = {row["label"]: row["figures"] for row in facts["rows"] if row["budget"] == 1.0}
    some = [figures[metric] for figures in whole.values() for metric in facts["metrics"]]
    half = max((figure["high"] - figure["low"]) / 2 for figure in some)
    about = facts["environment"]
    unpruned, shuffled = (
        " and ".join(f"{100 * whole[label][m]['value']:.1f}" for m in facts["metrics"])
        for label in ("unpruned", "shuffled")
    )
    levels = " and ".join(metric.partition("/")[0] for metric in facts["metrics"])
    return [
        f"Percent of right answers of the shipped demo VLM on {some[0]['images']} test scenes of"
        f" each level ({levels}), at shares of its 144 visual tokens. Unpruned: {unpruned}; on the"
        f" image of another scene: {shuffled}. 95% intervals are ±{100 * half:.1f} or less; a star"
        " marks a paired difference to `random` whose interval excludes 0. `stages=[[1,K]]`: K"
        " tokens from the language model's second layer of three on; the others read fewer in all.",
        "",
        f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}, ocvtp"
        f" {about['ocvtp']}. Intervals, all kinds of questions and the command are in"
        " [the whole report](results/demo-vlm/report.md).",
    ]


def _name(rows: dict[float, Any]) -> str:
    row = next(iter(rows.values()))
    seeds = f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
    mark = "control" if row["control"] else "trained" if row["trained"] else ""
    marks = f"{mark}{seeds}".strip(", ")
    return f"`{row['label']}`" + (f" ({marks})" if marks else "")


def _value(row: dict[str, Any] | None, metric: str) -> float:
    if row is None or metric not in row["figures"]:
        return 0.0
    return float(row["figures"][metric]["value"])


def _cell(row: dict[str, Any] | None, metric: str) -> str:
    if row is None or metric not in row["figures"]:
        return "-"
    figure = row["figures"][metric]
    lead = figure["minus_random"]
    star = "*" if lead and (lead["low"] > 0 or lead["high"] < 0) else ""
    return f"{_percent(figure['value'])}{star}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
