"""A command that is killed at a random moment and repeated ends as one that is not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.kills import _difference
from benchmarks.reliability import exceptions, memory, threads


@pytest.mark.slow
def test_killed_commands_end_alike(tmp_path):
    """Of a process of its own, which has no threads: it forks. The other commands take long."""
    words = ["--only", "kills", "--commands", "train", "resize", "--points", "2"]
    output = tmp_path / "reliability.json"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.reliability", *words, "--output", str(output)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(output.read_text())["kills"].values()
    assert [(one["points"], one["alike"]) for one in found] == [(2, 2), (2, 2)]
    assert sum(one["hit"] for one in found) > 0


def test_what_differs_is_told():
    one = {"a": {"b": torch.tensor([1.0, 2.0])}, "c": 3}
    assert _difference({"a": {"b": torch.tensor([1.0, 2.0])}, "c": 3}, one) is None
    assert "/a/b differs" in _difference({"a": {"b": torch.tensor([1.0, 2.5])}, "c": 3}, one)
    assert "/c differs" in _difference({**one, "c": 4}, one)
    assert "it differs" in _difference({}, one)


@pytest.mark.slow
def test_nothing_is_left_by_exceptions_threads_and_calls():
    found = exceptions(40)
    assert found["faults"] == []
    assert found["count"] == 40
    assert threads(8, 4)["alike"] == 32
    assert memory(100)["growth"] < 2**24
