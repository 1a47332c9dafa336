"""How sure a figure is: bootstrap intervals over images, alone and of paired differences.

n items on I images. Items of one image are not independent, so whole images are drawn: Cameron,
Gelbach and Miller 2008, "Bootstrap-based improvements for inference with clustered errors". All
figures on I images see the same resamples, which are drawn once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ocvtp.evaluation.tasks.base import Ratio

RESAMPLES = 2000
_SEED = 0
_QUANTILES = (0.025, 0.975)
_CELLS = 4_000_000  # of a resample matrix held in float64 at once: 32 MB

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A share and its 95% interval.

    Args:
        value: nan where nothing counts.
        low, high: nan with the value, and with fewer than two images, which say nothing of
            others. Where all images agree (all right, say) the interval is a point and too sure.
        n: items. images: on which they are asked.
    """

    value: float
    low: float
    high: float
    n: int
    images: int


@dataclass(frozen=True)
class Difference:
    """One share minus another on the same items, and the 95% interval of that.

    Args:
        value, low, high: as in `Estimate`.
        agreement: share of items with equal hits; None unless both count 0 or 1 of every item.
        p: of McNemar's exact test, which takes items for independent; None as `agreement` is.
    """

    value: float
    low: float
    high: float
    agreement: float | None
    p: float | None


def estimate(ratio: Ratio) -> Estimate:
    """A share with its 95% percentile bootstrap interval over images, 2000 resamples.

    Raises:
        ValueError: if the ratio's arrays are not [n] each.
    """
    low, high = _interval(ratio)
    images = len(np.unique(ratio.owners))
    return Estimate(ratio.value, low, high, len(ratio.hits), images)


def difference(a: Ratio, b: Ratio) -> Difference:
    """How much a is above b, with its 95% interval: both see the same resamples of images.

    Raises:
        ValueError: if the two are not about the same items, or their arrays are not [n] each.
    """
    _check_same([a, b])
    low, high = _interval(a, b)
    agreement = p = None
    if _is_binary(a) and _is_binary(b):
        agreement = float((a.hits == b.hits).mean())
        p = mcnemar(int((a.hits > b.hits).sum()), int((a.hits < b.hits).sum()))
    return Difference(a.value - b.value, low, high, agreement, p)


def average(ratios: Sequence[Ratio]) -> Ratio:
    """One condition over its seeds: the mean of hits and of `of`, item by item.

    Raises:
        ValueError: if there is none, or they are not about the same items.
    """
    if not ratios:
        raise ValueError("no ratio to average; pass at least one.")
    _check_same(ratios)
    hits, of = (np.mean([getattr(r, name) for r in ratios], axis=0) for name in ("hits", "of"))
    return Ratio(hits, of, ratios[0].owners)


def mcnemar(more: int, less: int) -> float:
    """Two-sided exact p: how unlikely `more` against `less` is for a fair coin.

    P(X <= min) + P(X >= max) for X ~ Binomial(more + less, 1/2): McNemar 1947 in its exact form.
    """
    n, fewer = more + less, min(more, less)
    if more == less:
        return 1.0
    steps = np.arange(fewer)
    log_terms = np.concatenate([[0.0], np.cumsum(np.log((n - steps) / (steps + 1)))])  # of C(n, i)
    return min(1.0, float(2 * np.exp(log_terms - n * np.log(2)).sum()))


def _interval(a: Ratio, b: Ratio | None = None) -> tuple[float, float]:
    """Percentiles over resamples of a, or of a - b; those in which nothing counts are left out."""
    ratios = [a] if b is None else [a, b]
    for ratio in ratios:
        _check(ratio)
    _, owners = np.unique(a.owners, return_inverse=True)  # [n] in 0..I-1
    images = int(owners.max(initial=-1)) + 1
    if images < 2:
        return float("nan"), float("nan")
    columns = [column for ratio in ratios for column in (ratio.hits, ratio.of)]
    sums = [np.bincount(owners, column, images).astype(np.float64) for column in columns]
    drawn = _resampled(np.stack(sums, axis=1))  # [RESAMPLES, 2 or 4]
    with np.errstate(invalid="ignore", divide="ignore"):
        values = drawn[:, 0] / drawn[:, 1]
        if b is not None:
            values -= drawn[:, 2] / drawn[:, 3]
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, _QUANTILES)
    return float(low), float(high)


def _resampled(sums: Array) -> Array:
    """[RESAMPLES, C] sums over drawn images, from [I, C] sums of each image."""
    times = _times_drawn(len(sums))
    step = _rows_at_once(len(sums))
    parts = [times[s : s + step].astype(np.float64) @ sums for s in range(0, RESAMPLES, step)]
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _times_drawn(images: int) -> NDArray[np.uint8]:
    """[RESAMPLES, I] how often each image is drawn: I draws with replacement.

    A byte holds it: 256 times the same image is less likely than 1e-500.
    """
    rng, even = np.random.default_rng(_SEED), np.full(images, 1 / images)
    times = np.empty((RESAMPLES, images), np.uint8)
    step = _rows_at_once(images)
    for start in range(0, RESAMPLES, step):
        rows = times[start : start + step]
        rows[:] = rng.multinomial(images, even, size=len(rows))
    times.flags.writeable = False  # shared by the cache
    return times


def _rows_at_once(images: int) -> int:
    """Resamples whose float64 matrix stays small."""
    return max(_CELLS // images, 1)


def _is_binary(ratio: Ratio) -> bool:
    right_or_wrong = (ratio.hits == 0) | (ratio.hits == 1)
    return bool(len(ratio.hits) and right_or_wrong.all() and (ratio.of == 1).all())


def _check(ratio: Ratio) -> None:
    shapes = [np.shape(part) for part in (ratio.hits, ratio.of, ratio.owners)]
    if shapes != [(len(ratio.owners),)] * 3:
        raise ValueError(f"hits, of and owners are {shapes}; pass three arrays [n] of one length.")


def _check_same(ratios: Sequence[Ratio]) -> None:
    """Refuse ratios of other items; the order of their images tells."""
    for ratio in ratios:
        _check(ratio)
        if not np.array_equal(ratio.owners, ratios[0].owners):
            raise ValueError(
                f"figures of {len(ratios[0].owners)} and {len(ratio.owners)} items are not of the "
                "same items: their images differ; pass ratios of one task, items in one order."
            )
