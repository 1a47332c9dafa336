"""The way of one call through the package stays short; `python -m tools.trip` prints it."""

from __future__ import annotations

import pytest

from tools.trip import Trip, follow, generate_trip

MOST = {"fastervlm": 124, "fastv:stages=[[1,16]]": 152, "tome": 216}


@pytest.mark.parametrize("spec", MOST)
def test_one_call_makes_few_hops(spec: str) -> None:
    assert generate_trip(spec).hops <= MOST[spec]


def test_hops_are_changes_of_file() -> None:
    from ocvtp.ops import selection
    from ocvtp.pruners.budgets import check_count

    def work() -> None:
        check_count("a", 1)
        check_count("b", 2)
        selection.ascending.__name__.upper()
        check_count("c", 3)

    trip = follow(work)
    assert isinstance(trip, Trip)
    assert trip.files == ["pruners/budgets.py"]
    assert trip.hops == 0
