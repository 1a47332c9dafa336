"""Qwen3-VL: rows of the tower on their way to the language model's first layers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_qwen import BATCH, ONE, make_batch, tiny_qwen3

from ocvtp import attach, build_pruner
from ocvtp.hosts.in_llm.deepstack import Deepstack


@pytest.fixture(scope="module")
def qwen3() -> Any:
    return tiny_qwen3()


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("num_more", [0, 2])
@pytest.mark.parametrize("columns", [slice(0, 6), slice(2, 5), slice(5, 6)])
def test_a_part_has_the_rows_of_its_columns(columns: slice, num_more: int, repeats: int) -> None:
    images = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0]]).bool()
    rows = torch.arange(12.0).view(2, 6, 1)  # of two layers
    part = Deepstack.at(images, rows).part(columns, repeats, num_more)
    found, expected_mask = part.arguments(), []
    expected: list[list[Any]] = [[], []]
    of_column = dict(zip(map(tuple, images.nonzero().tolist()), range(6), strict=True))
    for row in range(3):
        for _ in range(repeats):
            own = [of_column.get((row, column)) for column in range(columns.start, columns.stop)]
            expected_mask.append([number is not None for number in own] + [False] * num_more)
            for layer, numbers in enumerate(expected):
                numbers += [rows[layer, number] for number in own if number is not None]
    assert found["visual_pos_masks"].tolist() == expected_mask
    for layer, numbers in zip(found["deepstack_visual_embeds"], expected, strict=True):
        assert layer.tolist() == [number.tolist() for number in numbers]


@torch.no_grad()
def test_rows_change_the_answer(qwen3: Any) -> None:
    """So that the tests against prompts made by hand see them."""
    inputs, blind = make_batch(ONE), deepcopy(qwen3)
    for merger in blind.model.visual.deepstack_merger_list:
        merger.linear_fc2.weight.zero_()
        merger.linear_fc2.bias.zero_()
    logits = []
    for model in (qwen3, blind):
        with build_pruner("uniform", num_keep=5)(model):
            logits.append(model(**inputs).logits)
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_training_reaches_the_tower_through_them(qwen3: Any) -> None:
    model, inputs = deepcopy(qwen3), make_batch(BATCH)
    with build_pruner("uniform", num_keep=5)(model):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for merger in model.model.visual.deepstack_merger_list:
        assert merger.linear_fc2.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_rows_that_nobody_takes_are_an_error(qwen3: Any) -> None:
    model, inputs = deepcopy(qwen3), make_batch(ONE)

    def replace(prompt: Any) -> None:
        model.model.language_model = deepcopy(qwen3.model.language_model)

    handle = attach(model, build_pruner("uniform", num_keep=5), on_prune=replace)
    with pytest.raises(RuntimeError, match="replace no modules while a call runs"):
        model(**inputs)
    with pytest.raises(RuntimeError, match="replace no modules while a call runs"):
        model.generate(**inputs, max_new_tokens=2)
    model(**make_batch([(4,)]))  # which has none
    handle.remove()


@torch.no_grad()
def test_a_language_model_that_was_replaced_takes_them(qwen3: Any) -> None:
    model, inputs = deepcopy(qwen3), make_batch(ONE)
    with build_pruner("uniform", num_keep=5)(model):
        expected = model(**inputs).logits
        model.model.language_model = deepcopy(qwen3.model.language_model)
        assert model(**inputs).logits.equal(expected)
