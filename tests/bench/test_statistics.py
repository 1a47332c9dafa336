"""Intervals of medians: they hold what two runs of the same thing differ by."""

from __future__ import annotations

import numpy as np
import pytest

from ocvtp.bench import statistics


def rounds(rng, count=50, correlation=0.0, shared=0.0, noise=0.03):
    """[2, count] times of two rows near 10 ms: noise that lasts, shared and of each."""

    def series():
        steps = rng.normal(0, noise * np.sqrt(1 - correlation**2), count + 50)
        values = np.zeros(count + 50)
        for i in range(1, count + 50):
            values[i] = correlation * values[i - 1] + steps[i]
        return values[50:]

    common = series() * shared
    return np.exp(np.log(10) + common + np.stack([series(), series()]))


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_the_interval_holds_the_true_median(correlation):
    rng, held = np.random.default_rng(1), []
    for _ in range(150):
        row = rounds(rng, correlation=correlation)[0]
        found = statistics.median(row, statistics.block_length([row]))
        held.append(found.low <= 10 <= found.high)
    assert np.mean(held) > 0.9


def test_drawing_rounds_alone_would_be_too_sure_of_noise_that_lasts():
    rng, held = np.random.default_rng(1), []
    for _ in range(150):
        found = statistics.median(rounds(rng, correlation=0.8)[0], block=1)
        held.append(found.low <= 10 <= found.high)
    assert np.mean(held) < 0.8


def test_blocks_grow_with_the_noise_that_lasts():
    rng = np.random.default_rng(0)
    short = statistics.block_length(rounds(rng).tolist())
    long = statistics.block_length(rounds(rng, correlation=0.9).tolist())
    assert short < long <= 10
    assert statistics.block_length([[1.0, 2.0, 1.0, 2.0, 1.5]]) == 1


def test_ratios_are_paired_by_round():
    rng = np.random.default_rng(0)
    above, below = rounds(rng, shared=5.0, noise=0.01)
    found = statistics.ratio(above, below, 5)
    alone = statistics.median(above, 5)
    assert found.low < 1 < found.high
    assert (found.high - found.low) < 0.5 * (alone.high - alone.low) / alone.value


def test_a_few_rounds_are_less_sure_than_their_spread():
    few, many = ([10.0, 10.1, 9.9, 10.2, 10.0] * times for times in (1, 20))
    width = [statistics.median(row, 1).high - statistics.median(row, 1).low for row in (few, many)]
    assert width[0] > 2 * width[1]


def test_students_quantile():
    scipy = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 9, 49):
        true = pytest.approx(scipy.t.ppf(0.975, freedom), rel=3e-3)
        assert statistics.quantile_of_t(freedom) == true
