"""generate() of a pruned LLaVA-NeXT with its budgets and separators; modes: test_matrix.py."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import reference
import torch
from reference import ask, assert_close
from reference_next import BATCH, ONE, SEVERAL, best_cells, make_next, shorten_next, single_next

from ocvtp import Pruner, build_pruner

NUM_NEW = 5
pytestmark = [pytest.mark.usefixtures("untouched_next"), pytest.mark.sampled(1)]
PROMPTS = {"several": SEVERAL, "batch": BATCH}
prompts = pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
budgets = pytest.mark.parametrize("budget", ["per_image", "per_tile"])


@pytest.fixture
def pruner() -> Pruner:
    return build_pruner("fastervlm", num_keep=5)


def by_hand(model: Any, inputs: Any, budget: str = "per_image", separators: str = "rows") -> Any:
    return shorten_next(model, inputs, best_cells(model, inputs, 5, budget), separators)


def answer_of(model: Any, inputs: Any, **settings: Any) -> torch.Tensor:
    """The first tokens of the answer."""
    return reference.answer_of(model, inputs, max_new_tokens=NUM_NEW, **settings)


@prompts
@budgets
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_greedy_equals_a_hand_written_loop(
    llava_next: Any, pruner: Pruner, rows: Any, budget: Any, positions: Any
) -> None:
    inputs = make_next(rows)
    expected = by_hand(llava_next, inputs, budget).greedy(NUM_NEW, positions)
    with pruner(llava_next, budget=budget, positions=positions):
        actual = answer_of(llava_next, inputs, do_sample=False)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("separators", ["all", "none"])
@budgets
def test_other_separators(llava_next: Any, pruner: Pruner, budget: Any, separators: Any) -> None:
    inputs = make_next(BATCH)
    expected = by_hand(llava_next, inputs, budget, separators).greedy(NUM_NEW)
    with pruner(llava_next, budget=budget, separators=separators):
        assert torch.equal(answer_of(llava_next, inputs, do_sample=False), expected)


def test_a_batch_equals_single_calls(llava_next: Any, pruner: Pruner) -> None:
    inputs = make_next(BATCH)
    with pruner(llava_next):
        batched = answer_of(llava_next, inputs, do_sample=False)
        for row in range(3):
            alone = answer_of(llava_next, single_next(inputs, row), do_sample=False)
            assert torch.equal(batched[row : row + 1], alone)


def test_lengths_are_those_without_a_pruner(llava_next: Any, pruner: Pruner) -> None:
    inputs = make_next(BATCH)
    length = inputs["input_ids"].shape[1]
    with pruner(llava_next):
        assert llava_next.generate(**inputs, max_length=length + 3).shape[1] == length + 3


def test_a_compiled_tower_is_looked_into(llava_next: Any, pruner: Pruner) -> None:
    model, inputs = deepcopy(llava_next), make_next(ONE)
    torch.compiler.reset()
    model.model.vision_tower.compile(backend="eager")
    with pruner(model):
        assert torch.equal(ask(model, inputs), by_hand(llava_next, inputs).greedy(5))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models(llava_next: Any, pruner: Pruner) -> None:
    model, inputs = deepcopy(llava_next), make_next(BATCH)
    torch.compiler.reset()
    with pruner(model):
        logits = torch.compile(model, backend="eager")(**inputs).logits
    short = by_hand(llava_next, inputs)
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-5)
