"""Rows one by one against one matrix of all pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ocvtp.ops import similarity
from ocvtp.ops.similarity import (
    all_pairs,
    cosine_pairs,
    cosine_to,
    cosine_to_sum,
    nearest_in,
    nearest_of,
    nearest_other,
    pairs_fit,
    pairs_pay,
    unit,
)


@pytest.mark.parametrize("count", [1, 5, 128, 300])
def test_all_pairs_are_the_products_of_every_two(count):
    torch.manual_seed(0)
    x = torch.randn(2, count, 6, dtype=torch.float64)
    assert_close(all_pairs(x), x @ x.mT)
    assert (all_pairs(x.requires_grad_()) * 1).grad_fn is None


def test_pairs_of_different_blocks_are_symmetric_to_the_last_bit():
    x = torch.randn(1, 200, 33, generator=torch.Generator().manual_seed(0))
    pairs = all_pairs(x)[0]
    block = similarity._BLOCK
    assert pairs[:block, block:].equal(pairs[block:, :block].T)


def test_nearest_in_the_matrix_is_the_nearest_other():
    torch.manual_seed(0)
    directions = unit(torch.randn(2, 300, 6, dtype=torch.float64))
    valid = torch.arange(300) < torch.tensor([[300], [131]])
    for real in (None, valid):
        assert_close(nearest_in(all_pairs(directions), real), nearest_other(directions, real))
    assert nearest_in(all_pairs(directions[:, :1]), None).tolist() == [[-math.inf]] * 2


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "pays"),
    [
        (576, 64, True), (576, 58, True), (576, 57, False), (2880, 160, False), (2880, 640, True),
        (8192, 820, True), (8193, 8193, False),
    ],
)  # fmt: skip
def test_a_matrix_pays_from_a_tenth_of_the_rows_on_where_it_fits(num_tokens, num_rows, pays):
    assert pairs_pay(num_tokens, num_rows) == pays
    assert pairs_fit(num_tokens) or not pays


def test_cosines_without_unit_vectors():
    torch.manual_seed(0)
    x, chosen = torch.randn(3, 9, 6, dtype=torch.float64), torch.rand(3, 9) < 0.5
    x *= torch.logspace(-6, 6, 9, dtype=x.dtype)[:, None]  # of any length
    x[1, 4] = 0  # a blank token is like nothing
    cosine, others = unit(x) @ unit(x).mT, unit(torch.randn(3, 4, 6, dtype=torch.float64))
    assert_close(cosine_pairs(x), cosine)
    assert_close(cosine_to(x, others[:, 0]), (unit(x) @ others[:, 0, :, None]).squeeze(2))
    assert_close(cosine_to_sum(x, chosen), (cosine * chosen[:, None]).sum(dim=2))
    assert_close(nearest_of(x, others), (unit(x) @ others.mT).amax(dim=2))
