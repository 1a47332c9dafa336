"""The cases that `make test-fast` runs of a test of many."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
from sampling import every_value, spread


def cases(*sizes, allowed=lambda *_: True):
    return [
        SimpleNamespace(callspec=SimpleNamespace(params=dict(zip("abc", index, strict=False))))
        for index in product(*map(range, sizes))
        if allowed(*index)
    ]


def values(found):
    return [tuple(case.callspec.params.values()) for case in found]


@pytest.mark.parametrize("sizes", [(7,), (7, 2), (2, 7), (3, 5, 2), (4, 4)])
def test_every_value_occurs(sizes):
    found = values(every_value(cases(*sizes)))
    assert [set(some) for some in zip(*found, strict=True)] == [set(range(n)) for n in sizes]
    assert len(found) == len(set(found)) == max(sizes)


def test_values_take_turns():
    found = [b for _, b in values(every_value(cases(6, 3)))]
    assert {number: found.count(number) for number in range(3)} == {0: 2, 1: 2, 2: 2}


def test_every_value_occurs_where_not_all_go_together():
    some = cases(5, 4, allowed=lambda a, b: b == 0 or a == 4)
    found = values(every_value(some))
    assert {a for a, _ in found} == set(range(5))
    assert {b for _, b in found} == set(range(4))


def test_so_many_are_spread_evenly():
    assert values(spread(cases(9), 3)) == [(0,), (4,), (8,)]
    assert values(spread(cases(9), 1)) == [(0,)]


@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(3))
def test_the_others_are_slow(request, a, b):
    assert (request.node.get_closest_marker("slow") is None) == (a == b)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("a", [pytest.param(0, marks=pytest.mark.slow), 1, 2, 3])
def test_slow_cases_stay_slow(request, a):
    assert (request.node.get_closest_marker("slow") is None) == (a in (1, 3))
