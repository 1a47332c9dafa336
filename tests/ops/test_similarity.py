"""Rows one by one against one matrix of all pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ocvtp.ops import similarity
from ocvtp.ops.similarity import Cosines, all_pairs, pairs_fit, pairs_pay, unit


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


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "pays"),
    [
        (576, 64, True), (576, 42, True), (576, 41, False), (2880, 160, False), (2880, 640, True),
        (8192, 586, True), (8193, 8193, False),
    ],
)  # fmt: skip
def test_a_matrix_pays_from_a_fourteenth_of_the_rows_on_where_it_fits(num_tokens, num_rows, pays):
    assert pairs_pay(num_tokens, num_rows) == pays
    assert pairs_fit(num_tokens) or not pays


@pytest.mark.parametrize("num_rows", [0, 9])  # one by one, of a matrix
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cosines_without_unit_vectors(num_rows, dtype):
    torch.manual_seed(0)
    x, chosen = torch.randn(3, 9, 6, dtype=torch.float64), torch.rand(3, 9) < 0.5
    x *= torch.logspace(-6, 6, 9, dtype=x.dtype)[:, None]  # of any length
    x[1, 4] = 0  # a blank token is like nothing
    x = x.to(dtype)
    cosines, each = Cosines(x, num_rows), unit(x) @ unit(x).mT
    pick, core = torch.tensor([3, 4, 0]), torch.tensor([[0, 4], [4, 7], [8, 2]])
    images, direction = torch.arange(3), unit(torch.randn(3, 6, dtype=torch.float64)).to(each)
    assert_close(cosines(pick), each[images, pick])
    assert_close(cosines.to(direction), (unit(x) @ direction[:, :, None]).squeeze(2))
    assert_close(cosines.to_sum(chosen), (each * chosen[:, None]).sum(dim=2))
    assert_close(cosines.nearest_of(core), each[images[:, None], core].amax(dim=1))
    assert (cosines.lengths == 0).nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("num_rows", [0, 9])
def test_a_cosine_that_is_no_number_is_0(num_rows):
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    x[0, 3] *= 1e19
    x[0, 5] = math.nan
    cosines, odd = Cosines(x, num_rows), torch.tensor([3, 5])
    direction = unit(torch.ones(1, 64))
    for row in (cosines(odd[:1]), cosines.to_sum(torch.ones(1, 9, dtype=torch.bool))):
        assert row.isfinite().all()
    assert cosines.to(direction)[0, odd].tolist() == [0, 0]
    assert cosines.nearest_of(torch.tensor([[0, 1]]))[0, odd].tolist() == [0, 0]
    assert (cosines.nearest_of(torch.tensor([[0, 1]]))[0, :2] > 0.9).all()


@pytest.mark.parametrize("most", [0, 300])
def test_the_nearest_other_with_a_matrix_and_without(most, monkeypatch):
    monkeypatch.setattr(similarity, "_MOST_TOKENS", most)
    torch.manual_seed(0)
    x = torch.randn(2, 300, 6, dtype=torch.float64)
    valid = torch.arange(300) < torch.tensor([[300], [131]])
    each = (unit(x) @ unit(x).mT) - 3.0 * torch.eye(300, dtype=torch.float64)
    assert_close(Cosines(x, 300).nearest_other(None), each.amax(dim=2))
    real = each.masked_fill(~(valid[:, None] & valid[:, :, None]), -math.inf)
    assert_close(Cosines(x, 300).nearest_other(valid), real.amax(dim=2))
    assert Cosines(x[:, :1], 300).nearest_other(None).tolist() == [[-math.inf]] * 2
