"""Budgets of a training: counts, and shares of each image's own tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ocvtp
from ocvtp.selectors.budgets import check_budgets, count_of, counts_of
from ocvtp.structures import VisualTokens
from tests.pruners.test_contract import NoSync

COUNTS = (9, 4, 1)


def tokens_of(counts):
    most = max(counts)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    features = torch.zeros(len(counts), most, 2)
    return VisualTokens(features, (1, most), valid=None if bool(valid.all()) else valid)


@pytest.mark.parametrize("share", [0.01, 0.055, 0.11, 0.5, 0.999, 1.0])
def test_a_share_is_that_of_a_pruner(share):
    pruner = ocvtp.build_pruner("random", keep_ratio=share)
    for count in (1, 2, 9, 144, 577, 2881):
        assert count_of(share, count) == pruner.budget(count)


def test_every_image_keeps_a_share_of_its_own_tokens():
    assert counts_of(3, tokens_of(COUNTS)) == 3
    assert counts_of(0.5, tokens_of((9, 9))) == 4
    tokens = tokens_of(COUNTS)
    with NoSync():
        found = counts_of(0.5, tokens)
    assert found.tolist() == [4, 2, 1]


def test_budgets_are_plain_numbers():
    assert check_budgets("budgets", [16, 0.11, 1, 1.0]) == [16, 0.11, 1, 1.0]
    kinds = [type(value) for value in check_budgets("budgets", (16, 0.11, 1, 1.0))]
    assert kinds == [int, float, int, float]
    assert check_budgets("budgets", [10**400]) == [10**400]
    found = check_budgets("budgets", [torch.tensor(16), torch.tensor(0.5), np.int64(1)])
    assert [(type(value), value) for value in found] == [(int, 16), (float, 0.5), (int, 1)]


@pytest.mark.parametrize(
    "given", [[], [0], [0.0], [1.5], [-3], [True], ["16"], 16, [float("nan")], [[16]]]
)
def test_other_budgets_are_refused(given):
    with pytest.raises(ValueError, match=r"budgets=.*; pass at least one: .* or shares"):
        check_budgets("budgets", given)
