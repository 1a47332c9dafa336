"""What it is worth that tokens keep the positions that they had in the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ocvtp.evaluation.hard_questions import Shown
from ocvtp.evaluation.intervals import difference
from ocvtp.evaluation.labels import ORIGINAL


def by_positions(rows: Sequence[Shown], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Original minus contiguous positions, of every pruner and budget that was asked with both.

    Returns:
        of each the `metric`, `label`, `budget`, and the paired difference, see `Difference`.
    """
    known = {(label, budget): figures for label, budget, figures in rows}
    pairs = [
        (label.removesuffix(ORIGINAL), budget, figures)
        for label, budget, figures in rows
        if label.endswith(ORIGINAL)
    ]
    return [
        {"metric": metric, "label": label, "budget": budget}
        | asdict(difference(figures[metric], known[label, budget][metric]))
        for metric in metrics
        for label, budget, figures in pairs
        if metric in figures and metric in known.get((label, budget), {})
    ]
