"""Spans of a request: exclusive, without gaps."""

from __future__ import annotations

import pytest
import torch

from ocvtp.bench import timeline as spans
from ocvtp.bench.samples import DECODE, MODEL, SELECT, TOWER
from ocvtp.bench.timeline import Marks


def marked(readings):
    """A request: choosing inside the tower, the prompt, three tokens of which the middle is not."""
    values = iter(readings)
    marks = Marks(lambda: next(values))
    marks.start()
    marks.enter(TOWER)
    marks.enter(SELECT)
    marks.leave()
    marks.leave()
    marks.enter(MODEL)
    marks.leave()
    marks.token(is_last=False)
    marks.enter(MODEL)  # the pass of a decode step is no stage of its own
    marks.leave()
    marks.token(is_last=True)
    marks.stop()
    return marks


def test_a_stage_inside_another_takes_its_time_away():
    found = spans.seconds(marked([0, 1, 3, 10, 12, 20, 50, 51, 81, 82]))
    assert found == {
        "around": 1 + 8 + 1, "tower": 2 + 2, "select": 7, "project": 0, "model": 30, "decode": 30,
        "after": 1,
    }  # fmt: skip
    assert sum(found.values()) == 82


def test_peaks_are_the_largest_of_a_stage():
    found = spans.peaks(marked([99, 1, 5, 30, 7, 2, 40, 1, 3, 1]))
    assert (found[TOWER], found[SELECT], found[MODEL], found[DECODE]) == (7, 30, 40, 3)


def test_a_mark_costs_microseconds():
    assert spans.cost_of_a_mark(torch.device("cpu")) < 2e-5


def test_the_stage_that_runs_is_told():
    marks = Marks(lambda: 0)
    assert marks.stage == "around"
    marks.start()
    marks.enter(TOWER)
    assert marks.stage == TOWER
    marks.leave()
    assert marks.stage == "around"


@pytest.mark.gpu
def test_cuda_events_measure_the_device():
    device = torch.device("cuda")
    marks = Marks(spans.clock(device))
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    marks.start()
    marks.enter(TOWER)
    for _ in range(10):
        matrix = matrix @ matrix / 64
    marks.leave()
    marks.stop()
    torch.cuda.synchronize()
    found = spans.seconds(marks)
    assert found[TOWER] > 0.8 * sum(found.values()) > 0
