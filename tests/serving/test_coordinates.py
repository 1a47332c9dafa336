"""The coordinates of prompts with pruned images, against those of the whole prompt."""

from __future__ import annotations

import pytest
import torch
from tiny_qwen import BATCH, FAMILIES, ONE, SEVERAL, make_batch

from ocvtp.serving.coordinates import Place, apart, prompt_coordinates, with_columns


def grids_of(row):
    return [part for part in row if isinstance(part, tuple)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", [ONE[0], SEVERAL[0], BATCH[1], BATCH[2]], ids=str)
def test_they_are_those_of_the_whole_prompt_at_the_columns_that_stay(family, row):
    inputs = make_batch([row])
    ids, [types] = inputs["input_ids"][0], inputs["mm_token_type_ids"]
    whole, ahead = whole_prompt(family, inputs)
    random = torch.Generator().manual_seed(0)
    keep, images, first = torch.ones(len(ids), dtype=torch.bool), [], 0
    steps = torch.zeros(3, len(ids), dtype=torch.long)
    starts = (types.diff() == 1).nonzero()[:, 0] + 1
    for grid, start in zip(grids_of(row), starts.tolist(), strict=True):
        count = grid[0] * grid[1]
        kept = torch.randperm(count, generator=random)[: count // 3].sort().values
        own = torch.zeros(count, dtype=torch.bool)
        own[kept] = True
        keep[start : start + count] = own
        rows, inside = apart(with_columns(torch.zeros(len(kept), 5), kept, grid))
        assert rows.shape == (len(kept), 5)
        images.append(Place(start - first, len(kept), grid))
        steps[:, start + kept] = inside.T
        first += count - len(kept)
    found, further = prompt_coordinates(int(keep.sum()), images[::-1])
    assert torch.equal(found + steps[:, keep], whole[:, keep])
    assert int(keep.sum()) + further == len(ids) + ahead  # where the answer goes on


def whole_prompt(family, inputs):
    """[3, L] by transformers, and how far they run ahead of the columns."""
    if "image_grid_thw" not in inputs:
        return torch.arange(inputs["input_ids"].shape[1]).expand(3, -1), 0
    places, ahead = model_of(family).model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    return places[-3:, 0], int(ahead)


MODELS = {}


def model_of(family):
    if family not in MODELS:
        MODELS[family] = FAMILIES[family]()
    return MODELS[family]


def test_a_prompt_may_begin_and_end_with_images():
    found, ahead = prompt_coordinates(5, [Place(0, 2, (3, 2)), Place(3, 2, (1, 6))])
    assert found.tolist() == [[0, 0, 3, 4, 4]] * 3
    assert ahead == 5  # 10 after the longer side of the second, in column 5


@pytest.mark.parametrize("grid", [(2, 300), (300, 2), (1, 60000)])
def test_columns_are_exact_in_half_precision(grid):
    keep = torch.arange(0, grid[0] * grid[1], 7)
    rows = torch.randn(len(keep), 4, dtype=torch.bfloat16)
    alone, steps = apart(with_columns(rows, keep, grid))
    assert torch.equal(alone, rows)
    assert torch.equal(steps[:, 1] * grid[1] + steps[:, 2], keep)
    assert not steps[:, 0].any()
