"""How sure a median is: a block bootstrap over rounds.

n rounds, R resamples. What runs one after the other is slow together (the machine's clock, other
work on it), so rounds are not independent, and whole blocks of neighbours are drawn: Kuensch 1989,
"The jackknife and the bootstrap for general stationary observations"; in a circle, Politis and
Romano 1992. Few blocks say little of how much blocks differ: deviations are scaled by Student's t
over the normal quantile, as in the method of batch means (Law and Kelton 1984).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
MIN_BLOCKS = 5
_SEED = 0
_Z = 1.959964
_QUANTILES = (0.025, 0.975)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


def block_length(series: Sequence[Sequence[float]]) -> int:
    """Rounds in a block: twice the autocorrelation time, at least n^(1/3), at most n / 5.

    Args:
        series: [n] of each row. The time is that of the middle row, or of what all rows share (the
            mean of their logarithms) where that is longer.
    """
    logs = np.log(np.asarray(series, dtype=np.float64))
    n = int(logs.shape[1])
    times = [_correlation_time(row) for row in logs]
    longest = max(float(np.median(times)), _correlation_time(logs.mean(axis=0)))
    wanted = max(math.ceil(n ** (1 / 3)), math.ceil(2 * longest))
    return int(max(1, min(wanted, n // MIN_BLOCKS)))


def median(samples: Sequence[float], block: int) -> Interval:
    """The median with its interval.

    Args:
        samples: [n], above 0.
        block: see `block_length`.
    """
    value = float(np.median(samples))
    return _interval(value, deviations(samples, block))


def ratio(above: Sequence[float], below: Sequence[float], block: int) -> Interval:
    """The median of the ratios within rounds, which have the noise of a round in common."""
    return median(np.divide(above, below).tolist(), block)


def deviations(samples: Sequence[float], block: int) -> Array:
    """[R] how far the logarithm of the median of resamples lies from that of all rounds.

    Scaled for the number of blocks.
    """
    values = np.asarray(samples, dtype=np.float64)
    n = len(values)
    drawn = np.median(values[_rounds(n, block)], axis=1)
    return _widening(n, block) * (np.log(drawn) - math.log(float(np.median(values))))


def quantile_of_t(freedom: int) -> float:
    """Student's 97.5% quantile, by Hill's expansion around the normal one; from a table below 4."""
    if freedom < 4:
        return {1: 12.7062, 2: 4.3027, 3: 3.1824}[max(freedom, 1)]
    z, v = _Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / v ** (power + 1) for power, term in enumerate(terms))


def _interval(value: float, moved: Array) -> Interval:
    low, high = np.exp(np.quantile(moved, _QUANTILES))
    return Interval(value, value * float(low), value * float(high))


def _widening(n: int, block: int) -> float:
    blocks = n // block
    if blocks < 2:
        return quantile_of_t(1) / _Z
    return quantile_of_t(blocks - 1) / _Z * math.sqrt(blocks / (blocks - 1))


@lru_cache(maxsize=8)
def _rounds(n: int, block: int) -> NDArray[np.int64]:
    """[R, n] rounds of each resample: blocks of neighbours, in a circle."""
    rng = np.random.default_rng(_SEED)
    starts = rng.integers(0, n, size=(RESAMPLES, math.ceil(n / block)))
    rounds = (starts[:, :, None] + np.arange(block)) % n
    return rounds.reshape(RESAMPLES, -1)[:, :n]


def _correlation_time(values: Array) -> float:
    """1 + 2 sum of autocorrelations, up to the first that is not above 0 (Geyer 1992)."""
    n = len(values)
    ranks = np.argsort(np.argsort(values)).astype(np.float64)  # of outliers only the order counts
    centred = ranks - ranks.mean()
    variance = float(centred @ centred)
    total = 1.0
    for lag in range(1, n // 2):
        correlation = float(centred[:-lag] @ centred[lag:]) / max(variance, 1e-12)
        if correlation <= 0:
            break
        total += 2 * correlation
    return total
