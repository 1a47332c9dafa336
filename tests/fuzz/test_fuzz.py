"""Malformed inputs end in success or in one clear error, and what would not is told."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks import fuzz
from benchmarks.reliability_table import faults


@pytest.mark.slow
def test_malformed_inputs_are_harmless(request):
    found = fuzz.fuzz(request.config.getoption("--fuzz"))
    assert faults(found) == []
    assert found["inputs"] >= 0.9 * request.config.getoption("--fuzz")
    for kind, one in found["kinds"].items():
        assert one["counts"]["one error"] > 0, kind


@pytest.fixture
def outcome(tmp_path, capsys):
    """What comes of an input that does something."""
    inputs = fuzz.Inputs(tmp_path)

    def of(work):
        inputs.kinds = {"own": lambda draw: fuzz._done(work)}
        found = fuzz.Outcome()
        fuzz._one(inputs, "own", None, found)
        return found

    return of


def fails_with(error):
    def work():
        raise error

    return work


def test_what_is_wrong_is_told(outcome, tmp_path):
    assert outcome(lambda: None).counts == Counter(success=1)
    assert outcome(fails_with(ValueError("no"))).counts == {"one error": 1}
    assert outcome(fails_with(KeyError("x"))).faults == ["traceback: KeyError: 'x'"]
    assert outcome(fails_with(ValueError("a" * 10 + "\nocvtp: error: b"))).counts == {"unclear": 1}
    full = ValueError("you tried to allocate 4000000000 bytes")
    assert outcome(fails_with(full)).counts == {"memory": 1}
    assert outcome(lambda: (tmp_path / ".x.tmp").touch()).faults == ["left behind: .x.tmp"]


def test_a_large_allocation_is_refused():
    with fuzz.no_more_than(2**28), pytest.raises(MemoryError):
        bytearray(2**29)
    assert len(bytearray(2**29)) == 2**29
