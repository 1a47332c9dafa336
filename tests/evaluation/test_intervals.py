import numpy as np
import pytest
from scipy import stats

from ocvtp.evaluation import intervals
from ocvtp.evaluation.intervals import RESAMPLES, average, difference, estimate, mcnemar
from ocvtp.evaluation.tasks.base import Ratio


def answers(n=240, images=60, share=0.7, seed=0):
    """0/1 hits of items in turn on images; images differ in how hard they are."""
    rng = np.random.default_rng(seed)
    owners = np.sort(rng.integers(0, images, n)) * 3 + 5  # numbers with gaps
    ease = rng.normal(0, 0.15, images * 3 + 5)[owners]
    return Ratio((rng.random(n) < share + ease).astype(float), np.ones(n), owners)


def weighted(n=240, images=60, seed=1):
    """A share whose `of` varies and may be 0."""
    rng = np.random.default_rng(seed)
    of = rng.integers(0, 4, n).astype(float)
    return Ratio(of * rng.random(n), of, np.sort(rng.integers(0, images, n)))


def plain_loop(ratios, seed=0):
    """The bootstrap image by image: owners drawn, their items laid side by side again."""
    owners = np.unique(ratios[0].owners)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(RESAMPLES):
        times = rng.multinomial(len(owners), np.full(len(owners), 1 / len(owners)))
        drawn = [o for o, count in zip(owners, times, strict=True) for _ in range(count)]
        items = np.concatenate([np.flatnonzero(ratios[0].owners == o) for o in drawn])
        shares = [r.hits[items].sum() / r.of[items].sum() for r in ratios]
        values.append(shares[0] - (shares[1] if len(shares) > 1 else 0))
    return np.quantile(values, [0.025, 0.975])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("make", [weighted, answers])
def test_an_interval_is_the_plain_loops(make):
    ratio = make()
    found = estimate(ratio)
    assert found.value == ratio.hits.sum() / ratio.of.sum()
    assert (found.n, found.images) == (240, len(np.unique(ratio.owners)))
    np.testing.assert_allclose([found.low, found.high], plain_loop([ratio]), atol=1e-12)


@pytest.mark.slow
def test_a_difference_is_the_plain_loops_on_the_same_draws():
    a, b = answers(), answers(share=0.6, seed=0)
    found = difference(a, b)
    assert found.value == pytest.approx(a.value - b.value)
    np.testing.assert_allclose([found.low, found.high], plain_loop([a, b]), atol=1e-12)


def test_an_interval_is_scipys():
    ratio = answers(n=1500, images=300)
    _, numbers = np.unique(ratio.owners, return_inverse=True)
    hits, of = (np.bincount(numbers, part) for part in (ratio.hits, ratio.of))
    theirs = stats.bootstrap(
        (hits, of),
        lambda h, o, axis: h.sum(axis) / o.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=3,
    ).confidence_interval
    found = estimate(ratio)
    assert found.low == pytest.approx(theirs.low, abs=0.003)
    assert found.high == pytest.approx(theirs.high, abs=0.003)


def test_items_of_one_image_are_drawn_together():
    alone = answers(n=100, images=1)
    hits = np.tile([1.0, 0.0], 50)
    apart = Ratio(hits, np.ones(100), np.arange(100))
    together = Ratio(np.repeat(hits[:10], 10), np.ones(100), np.repeat(np.arange(10), 10))
    widths = [estimate(r).high - estimate(r).low for r in (apart, together)]
    assert widths[1] > 2.5 * widths[0]  # sqrt(10) in the limit
    assert np.isnan(estimate(alone).low)


def test_a_pair_is_surer_than_its_parts():
    a = answers(n=1000, images=250)
    hits = a.hits.copy()
    hits[:20] = 0
    found = difference(a, Ratio(hits, a.of, a.owners))
    assert found.high - found.low < (estimate(a).high - estimate(a).low) / 2


def test_nothing_depends_on_the_size_of_chunks(monkeypatch):
    before = estimate(answers())
    intervals._times_drawn.cache_clear()
    monkeypatch.setattr(intervals, "_CELLS", 700)
    assert intervals._rows_at_once(60) == 11
    after = estimate(answers())
    intervals._times_drawn.cache_clear()
    assert [after.low, after.high] == pytest.approx([before.low, before.high], abs=1e-12)


def test_every_resample_has_as_many_images():
    assert (intervals._times_drawn(37).sum(axis=1) == 37).all()
    assert len(np.unique(intervals._times_drawn(37), axis=0)) == RESAMPLES


@pytest.mark.parametrize("counts", [(0, 1), (3, 9), (9, 3), (5, 5), (0, 0), (0, 40), (812, 700)])
def test_p_is_scipys_binomial_test(counts):
    more, less = counts
    theirs = stats.binomtest(more, more + less).pvalue if more + less else 1.0
    assert mcnemar(more, less) == pytest.approx(theirs, rel=1e-9)


def test_a_difference_of_right_and_wrong_answers():
    owners = np.array([0, 0, 1, 1, 2, 2])
    a = Ratio(np.array([1.0, 1, 1, 1, 0, 1]), np.ones(6), owners)
    b = Ratio(np.array([1.0, 0, 0, 1, 1, 0]), np.ones(6), owners)
    found = difference(a, b)
    assert found.value == pytest.approx(2 / 6)
    assert found.agreement == pytest.approx(2 / 6)
    assert found.p == pytest.approx(stats.binomtest(3, 4).pvalue)
    same = difference(a, a)
    assert (same.value, same.low, same.high, same.agreement, same.p) == (0, 0, 0, 1, 1)


@pytest.mark.parametrize("part", ["hits", "of"])
def test_shares_of_other_counts_have_neither_p_nor_agreement(part):
    a = answers()
    parts = {"hits": a.hits.copy(), "of": a.of.copy()}
    parts[part][3] = 0.5 if part == "hits" else 0.0
    parts["hits"][3] *= part == "hits"
    b = Ratio(parts["hits"], parts["of"], a.owners)
    for found in (difference(a, b), difference(b, a)):
        assert found.p is None
        assert found.agreement is None


def test_seeds_are_averaged_item_by_item():
    owners = np.array([4, 4, 9])
    ratios = [
        Ratio(np.array(hits), np.array(of), owners)
        for hits, of in (([1.0, 0, 1], [1.0, 1, 2]), ([0.0, 0, 1], [1.0, 0, 2]))
    ]
    mean = average(ratios)
    assert mean.hits.tolist() == [0.5, 0, 1]
    assert mean.of.tolist() == [1, 0.5, 2]
    assert mean.owners.tolist() == [4, 4, 9]


def test_all_right_is_a_point():
    found = estimate(Ratio(np.ones(8), np.ones(8), np.arange(8) // 2))
    assert (found.value, found.low, found.high, found.n, found.images) == (1, 1, 1, 8, 4)


def test_one_image_has_a_value_and_no_interval():
    ratio = Ratio(np.array([1.0, 0]), np.ones(2), np.array([7, 7]))
    found = estimate(ratio)
    assert (found.value, found.n, found.images) == (0.5, 2, 1)
    assert np.isnan([found.low, found.high]).all()
    assert np.isnan(difference(ratio, ratio).low)


@pytest.mark.parametrize("n", [0, 6])
def test_where_nothing_counts_there_is_no_figure(n):
    nothing = Ratio(np.zeros(n), np.zeros(n), np.arange(n))
    found = estimate(nothing)
    assert np.isnan([found.value, found.low, found.high]).all()
    assert (found.n, found.images) == (n, n)
    assert difference(nothing, nothing).p is None


def test_resamples_in_which_nothing_counts_are_left_out():
    of = np.array([1.0, 0, 0])
    ratio = Ratio(0.25 * of, of, np.arange(3))
    assert estimate(ratio).low == estimate(ratio).high == 0.25


def test_other_items_are_refused():
    a = answers()
    for owners in (a.owners[::-1], a.owners[:-1], a.owners + 1):
        b = Ratio(np.ones(len(owners)), np.ones(len(owners)), owners)
        with pytest.raises(ValueError, match="not of the same items"):
            difference(a, b)
        with pytest.raises(ValueError, match="not of the same items"):
            average([a, b])
    with pytest.raises(ValueError, match="at least one"):
        average([])


def test_arrays_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\).*one length"):
        estimate(Ratio(np.ones(2), np.ones(3), np.arange(3)))
