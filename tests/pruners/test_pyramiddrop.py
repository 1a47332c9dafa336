"""PyramidDrop's schedules; its vector is in tests/hosts, where the layers are."""

from __future__ import annotations

import pytest

import ocvtp
from ocvtp.pruners.layer_pruner import LayerStage


def schedule(num_layers, num_tokens, **settings):
    found = ocvtp.build_pruner("pyramiddrop", **settings).schedule(num_layers, num_tokens)
    return [(stage.layer, stage.num_keep) for stage in found]


def test_the_papers_own_schedule_needs_no_budget():
    assert schedule(32, 576) == [(8, 288), (16, 144), (24, 72)]
    assert schedule(40, 2881) == [(10, 1440), (20, 720), (30, 360)]
    assert schedule(28, 3) == [(7, 1), (14, 1), (21, 1)]


@pytest.mark.parametrize("num_keep", [192, 200, 300, 500, 576])
def test_a_budget_is_an_average(num_keep):
    counts = [count for _, count in schedule(32, 576, num_keep=num_keep)]
    assert (576 + sum(counts)) / 4 == pytest.approx(num_keep, abs=0.5)
    assert 576 >= counts[0] >= counts[1] >= counts[2]
    if num_keep == 200:
        assert counts == [128, 64, 32]


def test_stages_replace_it():
    pruner = ocvtp.build_pruner("pyramiddrop", stages=((1, 0.5), (2, 7)))
    assert pruner.schedule(4, 30) == (LayerStage(1, 15), LayerStage(2, 7))
    assert pruner.layers(4) == (1, 2)


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="first 8 of 32 layers read all 576"):
        schedule(32, 576, num_keep=128)
    with pytest.raises(ValueError, match="layers 0, 1, 2, but the language model has 3"):
        ocvtp.build_pruner("pyramiddrop").layers(3)
