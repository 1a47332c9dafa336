"""Which cases of a test of many are run.

With the mark `covering(n)`, of the product of its parameters those in which every combination of n
values occurs: values of one parameter for 1, pairs for 2. `--every-case` runs the whole product.
What is parametrized together is one parameter.

By `make test-fast`: cases in which every value of each parameter occurs; of a test with the mark
`sampled`, so many cases as it says, spread evenly. All others are marked `slow`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest

LEFT_ALONE = ("slow", "gpu", "network")
Choice = tuple[tuple[str, tuple[int, ...]], ...]


def by_test(items: Sequence[Any]) -> Mapping[str, list[Any]]:
    """The cases of each test that has parameters."""
    tests: dict[str, list[Any]] = {}
    for item in items:
        if hasattr(item, "callspec"):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    return tests


def leave_repetitions_out(config: pytest.Config, items: list[Any]) -> None:
    left_out = set[Any]()
    for cases in by_test(items).values():
        if mark := cases[0].get_closest_marker("covering"):
            left_out |= set(cases) - set(covering(cases, *mark.args))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def mark_the_rest_slow(items: Sequence[Any]) -> None:
    alone = {item for item in items if any(map(item.get_closest_marker, LEFT_ALONE))}
    for cases in by_test([item for item in items if item not in alone]).values():
        sampled = cases[0].get_closest_marker("sampled")
        kept = set(spread(cases, *sampled.args) if sampled else covering(cases, 1))
        for case in cases:
            if case not in kept:
                case.add_marker(pytest.mark.slow)


def spread(cases: Sequence[Any], number: int) -> list[Any]:
    """The first, the last, and others between them at equal distances."""
    last = len(cases) - 1
    return [cases[round(last * i / max(number - 1, 1))] for i in range(number)]


def covering(cases: Sequence[Any], strength: int) -> list[Any]:
    """A case for each choice of the parameters that have most; those of others take turns."""
    choices = [list(choices_in(parameters(case), strength)) for case in cases]
    most = Counter(tuple(name for name, _ in one) for one in {c for some in choices for c in some})
    widest = max(most, key=lambda names: (most[names], names), default=())
    rows: dict[Choice, list[int]] = {}
    for number, some in enumerate(choices):
        own = next((one for one in some if tuple(name for name, _ in one) == widest), ())
        rows.setdefault(own, []).append(number)
    used, kept = Counter[Choice](), list[int]()
    for row in rows.values():
        kept.append(min(row, key=lambda number: sum(used[one] for one in choices[number])))
        used.update(choices[kept[-1]])
    for number, some in enumerate(choices):  # what the turns have missed
        if not all(used[one] for one in some):
            kept.append(number)
            used.update(some)
    return [cases[number] for number in sorted(set(kept))]


def choices_in(values: Mapping[str, tuple[int, ...]], strength: int) -> Iterator[Choice]:
    """What a case has of each so many parameters; of fewer parameters, of all."""
    return combinations(sorted(values.items()), min(strength, len(values)))


def parameters(case: Any) -> Mapping[str, tuple[int, ...]]:
    """The values of a case, those that are parametrized together as one."""
    left, found = {name: id(value) for name, value in case.callspec.params.items()}, {}
    for mark in case.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        found[",".join(names)] = tuple(left.pop(name) for name in names if name in left)
    return found | {name: (value,) for name, value in left.items()}
