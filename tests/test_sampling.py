"""The cases that `make test-fast` runs of a test of many."""

from __future__ import annotations

import math
from itertools import combinations, product
from types import SimpleNamespace

import pytest
from sampling import covering, leave_repetitions_out, parameters, spread


class Case(SimpleNamespace):
    """Equal to itself alone, as cases of pytest are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def cases(*sizes, allowed=lambda *_: True):
    return [
        Case(
            callspec=SimpleNamespace(params=dict(zip("abcd", index, strict=False))),
            iter_markers=lambda name: iter(()),
        )
        for index in product(*map(range, sizes))
        if allowed(*index)
    ]


def values(found):
    return [tuple(case.callspec.params.values()) for case in found]


@pytest.mark.parametrize("sizes", [(7,), (7, 2), (2, 7), (3, 5, 2), (4, 4)])
def test_every_value_occurs(sizes):
    found = values(covering(cases(*sizes), 1))
    assert [set(some) for some in zip(*found, strict=True)] == [set(range(n)) for n in sizes]
    assert len(found) == len(set(found)) == max(sizes)


def test_values_take_turns():
    found = [b for _, b in values(covering(cases(6, 3), 1))]
    assert {number: found.count(number) for number in range(3)} == {0: 2, 1: 2, 2: 2}


def test_every_value_occurs_where_not_all_go_together():
    some = cases(5, 4, allowed=lambda a, b: b == 0 or a == 4)
    found = values(covering(some, 1))
    assert {a for a, _ in found} == set(range(5))
    assert {b for _, b in found} == set(range(4))


@pytest.mark.parametrize("sizes", [(7, 4, 3), (2, 3, 2, 2), (3, 22, 2, 2), (5, 2), (4,)])
def test_every_pair_occurs(sizes):
    found = values(covering(cases(*sizes), 2))
    for i, j in combinations(range(len(sizes)), 2):
        assert len({(case[i], case[j]) for case in found}) == sizes[i] * sizes[j]
    most = sorted(sizes)[-2:]
    assert len(found) == len(set(found)) <= math.prod(most) + 2


def test_what_goes_together_is_one_parameter():
    mark = pytest.mark.parametrize(argnames=("a", "b"), argvalues=[(1, 2)]).mark
    (case,) = cases(1, 1, 1)
    case.iter_markers = lambda name: iter((mark,))
    assert {name: len(value) for name, value in parameters(case).items()} == {"a,b": 2, "c": 1}


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


def test_repetitions_are_left_out():
    told, items = [], cases(3, 2, 2) + cases(5)
    for number, item in enumerate(items):
        marks = {"covering": pytest.mark.covering(2).mark} if number < 12 else {}
        item.nodeid = f"{'many' if marks else 'few'}[{number}]"
        item.get_closest_marker = marks.get
    hook = SimpleNamespace(pytest_deselected=lambda items: told.extend(items))
    kept = list(items)
    leave_repetitions_out(SimpleNamespace(hook=hook), kept)
    assert kept == covering(items[:12], 2) + items[12:]
    assert len(told) == len(items) - len(kept) == 6
