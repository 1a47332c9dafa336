"""generate() of a pruned InternVL with its budgets; modes: test_matrix.py."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import Short
from reference_internvl import (
    BATCH,
    ONE,
    SEVERAL,
    best_cells,
    make_internvl,
    shorten_internvl,
    single_internvl,
)
from test_llava_next_generate import NUM_NEW, answer_of

from ocvtp import Pruner, build_pruner

pytestmark = [pytest.mark.usefixtures("untouched_internvl"), pytest.mark.sampled(1)]
PROMPTS = {"several": SEVERAL, "batch": BATCH}
prompts = pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
budgets = pytest.mark.parametrize("budget", ["per_image", "per_tile"])


@pytest.fixture
def pruner() -> Pruner:
    return build_pruner("fastervlm", num_keep=5)


def by_hand(model: Any, inputs: Any, budget: str = "per_image") -> Short:
    return shorten_internvl(model, inputs, best_cells(model, inputs, 5, budget))


@prompts
@budgets
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_greedy_equals_a_hand_written_loop(
    internvl: Any, pruner: Pruner, rows: Any, budget: Any, positions: Any
) -> None:
    inputs = make_internvl(rows)
    expected = by_hand(internvl, inputs, budget).greedy(NUM_NEW, positions)
    with pruner(internvl, budget=budget, positions=positions):
        assert answer_of(internvl, inputs, do_sample=False).equal(expected)


@budgets
def test_a_batch_equals_single_calls(internvl: Any, pruner: Pruner, budget: Any) -> None:
    inputs = make_internvl(BATCH)
    with pruner(internvl, budget=budget):
        together = answer_of(internvl, inputs, do_sample=False)
        for row in range(3):
            alone = answer_of(internvl, single_internvl(inputs, row), do_sample=False)
            assert together[row : row + 1].equal(alone)


def test_a_compiled_tower_is_looked_into(internvl: Any, pruner: Pruner) -> None:
    model, inputs = deepcopy(internvl), make_internvl(ONE)
    torch.compiler.reset()
    model.model.vision_tower.compile(backend="eager")
    with pruner(model):
        said = answer_of(model, inputs, do_sample=False)
    assert said.equal(by_hand(internvl, inputs).greedy(NUM_NEW))
