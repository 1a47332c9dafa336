"""Which cases of a test of many are run by `make test-fast`.

Of the product of its parameters, cases in which every value of each occurs; of a test with the mark
`sampled`, so many cases as it says, spread evenly. All others are marked `slow`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

LEFT_ALONE = ("slow", "gpu", "network")


def mark_the_rest_slow(items: Sequence[Any]) -> None:
    tests: dict[str, list[Any]] = {}
    for item in items:
        alone = any(item.get_closest_marker(name) for name in LEFT_ALONE)
        if hasattr(item, "callspec") and not alone:
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in tests.values():
        sampled = cases[0].get_closest_marker("sampled")
        kept = set(spread(cases, *sampled.args) if sampled else every_value(cases))
        for case in cases:
            if case not in kept:
                case.add_marker(pytest.mark.slow)


def spread(cases: Sequence[Any], number: int) -> list[Any]:
    """The first, the last, and others between them at equal distances."""
    last = len(cases) - 1
    return [cases[round(last * i / max(number - 1, 1))] for i in range(number)]


def every_value(cases: Sequence[Any]) -> list[Any]:
    """A case for each value of the parameter that has most; the other values take turns."""
    values = [{name: id(value) for name, value in c.callspec.params.items()} for c in cases]
    widest = max(values[0], key=lambda name: len({one[name] for one in values}))
    rows: dict[int, list[int]] = {}
    for number, one in enumerate(values):
        rows.setdefault(one[widest], []).append(number)
    used, kept = Counter[tuple[str, int]](), list[int]()
    for row in rows.values():
        kept.append(min(row, key=lambda number: sum(used[v] for v in values[number].items())))
        used.update(values[kept[-1]].items())
    for number, one in enumerate(values):  # values that the turns have missed
        if not all(used[value] for value in one.items()):
            kept.append(number)
            used.update(one.items())
    return [cases[number] for number in kept]
