"""Numbers that change over a training."""

from __future__ import annotations

import json

import pytest

from ocvtp.selectors.schedules import Schedule, parse_schedule


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, [3.0, 3.0, 3.0, 3.0]),
        ({"constant": 0.5}, [0.5, 0.5, 0.5, 0.5]),
        ({"linear": [0.2, 2.2]}, [0.2, 0.7, 1.2, 2.2]),
        ({"linear": (2, 0)}, [2.0, 1.5, 1.0, 0.0]),
        ({"cosine": [1.0, 0.0]}, [1.0, 0.8535533905932737, 0.5, 0.0]),
        ({"geometric": [1.0, 0.0625]}, [1.0, 0.5, 0.25, 0.0625]),
    ],
)
def test_a_schedule_goes_from_the_one_number_to_the_other(value, expected):
    schedule = parse_schedule(value)
    found = [schedule.at(share) for share in (0, 0.25, 0.5, 1)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert (schedule.at(-1), schedule.at(2)) == (found[0], found[3])
    assert parse_schedule(json.loads(json.dumps(schedule.plain()))) == schedule
    assert parse_schedule(schedule) == schedule


@pytest.mark.parametrize("way", ["linear", "cosine", "geometric"])
def test_ends_are_met_exactly(way):
    schedule = Schedule(way, 0.1, 0.7)
    assert (schedule.at(0), schedule.at(1)) == (0.1, 0.7)


def test_zero_all_the_time():
    assert parse_schedule(0).is_zero
    assert not parse_schedule({"linear": [0, 1]}).is_zero


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fast", "tau='fast'; pass a number, {constant: number}"),
        (None, "tau=None; pass a number, {constant: number}"),
        (True, "tau=True; pass a number above 0."),
        (float("nan"), "tau=nan; pass a number above 0."),
        (0, "tau=0; pass a number above 0."),
        ([1, 2], r"tau=\[1, 2\]; pass a number, {constant: number}"),
        ({}, "tau={}; pass a number, "),
        ({"linear": [1, 2], "cosine": [1, 2]}, r"{linear \| cosine \| geometric: \[from, to\]}"),
        ({"exponential": [1, 2]}, "tau={'exponential': .*pass a number"),
        ({"linear": [1]}, r"tau={'linear': \[1\]}; pass two numbers, {linear: \[from, to\]}"),
        ({"linear": 1}, "tau={'linear': 1}; pass two numbers"),
        ({"linear": [1, "2"]}, r"tau={'linear': \[1, '2'\]}; pass numbers"),
        ({"linear": [1, 0]}, r"tau={'linear': \[1, 0\]}; pass numbers above 0."),
        ({"geometric": [1, -1]}, "pass numbers above 0."),
        ({"constant": [1, 2]}, r"tau={'constant': \[1, 2\]}; pass numbers"),
        ({"constant": float("inf")}, "tau={'constant': inf}; pass numbers"),
        ({("linear",): [1, 2]}, "pass a number, "),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(value, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_schedule(value, "tau", above=0)
    assert "\n" not in str(caught.value)


def test_bounds():
    assert parse_schedule({"linear": [0, 1]}, least=0, most=1).end == 1
    with pytest.raises(ValueError, match=r"floor=2; pass a number of at least 0 and of at most 1"):
        parse_schedule(2, "floor", least=0, most=1)
    with pytest.raises(ValueError, match="between numbers above 0"):
        parse_schedule({"geometric": [1, 0]}, "weight", least=0)
