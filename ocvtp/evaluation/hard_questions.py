"""Figures on the questions that a smaller image loses, beside those on all of them.

Many questions need so little of an image that a smaller one answers them too; they tell nothing
about which tokens to keep. VTC-Bench (https://arxiv.org/abs/2510.07143) looks at the others, of
those that the whole model answers; here the whole model has a row of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ocvtp.evaluation.intervals import difference, estimate
from ocvtp.evaluation.labels import DOWNSAMPLE, POOL, RANDOM, UNPRUNED
from ocvtp.evaluation.tasks.base import Ratio

Shown = tuple[str, float | None, Mapping[str, Ratio]]
"""Label, budget and figures of a row of a report."""
_JUDGES = (DOWNSAMPLE, POOL)
"""Whose failures count; the first that a budget has."""
_HALF = 0.5  # of an answer that counts 0 to 1


def hard_questions(rows: Sequence[Shown], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The figures of every metric at every budget, on what the smaller image fails.

    Returns:
        a part for each metric and budget: `metric`, `budget`, `by` (`downsample`, or `pool` where
        images cannot be made smaller), `n` questions on `images`, and `rows` of `label`, `value`,
        `low`, `high`, `minus_unpruned`, `minus_random`. No part for metrics that do not count every
        question alone (precision, say).
    """
    budgets = sorted({budget for _, budget, _ in rows if budget}, reverse=True)
    return [
        part
        for metric in metrics
        for budget in budgets
        if budget < 1 and (part := _part(rows, metric, budget)) is not None
    ]


def _part(rows: Sequence[Shown], metric: str, budget: float) -> dict[str, Any] | None:
    ratios = {
        label: figures[metric]
        for label, at, figures in rows
        if (at == budget or label == UNPRUNED) and metric in figures
    }
    by = next((name for name in _JUDGES if name in ratios), None)
    if by is None or not _counts_each(ratios[by]):
        return None
    failed = ratios[by].hits < _HALF
    hard = {label: _only(ratio, failed) for label, ratio in ratios.items()}
    return {
        "metric": metric,
        "budget": budget,
        "by": by,
        "n": int(failed.sum()),
        "images": len(np.unique(ratios[by].owners[failed])),
        "rows": [_row(label, hard) for label in hard],
    }


def _row(label: str, hard: Mapping[str, Ratio]) -> dict[str, Any]:
    alone = asdict(estimate(hard[label]))
    minus = {
        f"minus_{other}": asdict(difference(hard[label], hard[other]))
        for other in (UNPRUNED, RANDOM)
        if other in hard and other != label
    }
    return {"label": label, **{k: alone[k] for k in ("value", "low", "high")}, **minus}


def _only(ratio: Ratio, some: NDArray[np.bool_]) -> Ratio:
    return Ratio(ratio.hits[some], ratio.of[some], ratio.owners[some])


def _counts_each(ratio: Ratio) -> bool:
    """Whether every question counts alone, from 0 to 1."""
    return bool((ratio.of == 1).all() and (ratio.hits >= 0).all() and (ratio.hits <= 1).all())
