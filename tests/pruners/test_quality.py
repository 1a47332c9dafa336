"""Every image keeps the fewest tokens that hold a share of what the method keeps tokens for."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from math import nan

import pytest
import torch

import ocvtp
from ocvtp.ops.ridge import mean_energy, token_weights
from ocvtp.pruners import pruner_class
from ocvtp.pruners.base import QualityPruner
from ocvtp.pruners.budgets import Budget
from ocvtp.pruners.checks import check_pruner, random_tokens
from ocvtp.pruners.specs import build_spec

NAMES = [n for n in ocvtp.list_pruners() if issubclass(pruner_class(n), QualityPruner)]
GRID = (6, 3)


def fewest(masses, share):
    """How many of the largest masses it takes, one by one."""
    total = list(accumulate(sorted(masses, reverse=True)))
    return 1 + sum(held < share * total[-1] for held in total)


def own(pruner, tokens):
    """Tokens kept of each image, counted by hand: those of the method itself."""
    real = [row[valid] for row, valid in zip(masses(pruner, tokens), tokens.real, strict=True)]
    return [fewest(row.tolist(), pruner.quality) for row in real]


def masses(pruner, tokens):
    if pruner.name == "fastervlm":
        return tokens.attention[-2, "cls"]
    if pruner.name == "trim":
        text = tokens.clip_text[:, 0]
        scores = -(tokens.clip_visual @ text[:, :, None]).squeeze(2)
        return scores.masked_fill(~tokens.real, -torch.inf).softmax(dim=1)
    keys = torch.cat([tokens.cls_keys[-1][:, None], tokens.keys[-1]], dim=1)
    logits = (keys @ tokens.cls_queries[-1][:, :, None]).squeeze(2) * keys.shape[2] ** -0.5
    there = torch.cat([torch.ones_like(tokens.real[:, :1]), tokens.real], dim=1)
    return logits.masked_fill(~there, -torch.inf).softmax(dim=1)[:, 1:]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["fastervlm", "trim", "prumerge"])
def test_as_many_as_it_takes(name, ragged):
    tokens = random_tokens(ocvtp.build_pruner(name, num_keep=3).needs, 4, GRID, ragged=ragged)
    for quality in (0.05, 0.5, 0.9, 1.0):
        pruner = ocvtp.build_pruner(name, quality=quality)
        more = 0 if name == "fastervlm" else 1  # the sum of the others
        real = tokens.real.sum(dim=1).tolist()
        expected = [min(n + more, most) for n, most in zip(own(pruner, tokens), real, strict=True)]
        assert pruner.select(tokens).counts().tolist() == expected
        capped = replace(pruner, max_keep=4)
        assert capped.select(tokens).counts().tolist() == [min(n, 4) for n in expected]


@pytest.mark.parametrize("name", NAMES)
def test_kept_are_those_of_the_count_that_it_comes_to(name):
    """An image alone as in a batch; more is kept for more, and the best of them."""
    needs = ocvtp.build_pruner(name, num_keep=3).needs
    tokens = random_tokens(needs, 3, GRID)
    before = torch.zeros(3, dtype=torch.long)
    for quality in (0.2, 0.6, 0.95):
        pruner = ocvtp.build_pruner(name, quality=quality)
        assert not pruner.exact
        found = pruner.select(tokens)
        counts = found.counts()
        assert bool((counts >= before).all())
        before = counts
        for image, count in enumerate(counts.tolist()):
            one = tokens.map(lambda t, image=image: t[image : image + 1])
            alone = pruner.select(one)
            assert alone.counts().tolist() == [count]
            kept = found.keep_indices[image, :count]
            assert torch.equal(alone.keep_indices[0, :count], kept)
            if name in ("fastervlm", "trim", "prumerge"):
                exact = ocvtp.build_pruner(name, num_keep=count).select(one)
                assert torch.equal(exact.keep_indices[0], kept)


@pytest.mark.parametrize("name", NAMES)
def test_the_contract_holds(name):
    check_pruner(ocvtp.build_pruner(name, quality=0.5), (3, 2))


def test_ridge_restores_as_much_as_it_says():
    pruner = ocvtp.build_pruner("ridge", quality=0.6, weights="none")
    tokens = random_tokens(pruner.needs, 4, GRID)
    found = pruner.select(tokens)
    for image, count in enumerate(found.counts().tolist()):
        one = tokens.map(lambda t, image=image: t[image : image + 1])
        targets = pruner._targets(one)
        weights = token_weights(one, "none", -1, 1, 4.0)
        energy = mean_energy(targets, weights)
        left = targets.clone()
        picks = []
        while 1 - float((weights * left.square().sum(dim=2)).sum() / energy) < 0.6:
            lengths = left.square().sum(dim=2)
            gains = (weights[:, :, None] * (left @ left.mT).square()).sum(dim=1)
            gains = gains / (lengths + 0.3 * energy)
            gains[0, picks] = -1
            picks.append(int(gains.argmax()))
            v = left[:, picks[-1]]
            left = left - (left @ v[:, :, None]) * v[:, None] / (v.square().sum() + 0.3 * energy)
        assert sorted(picks) == found.keep_indices[image, :count].tolist()


def test_what_it_may_be():
    for value in ("0.5", nan, 0, -0.1, 1.01, True, [0.5]):
        with pytest.raises(ValueError, match="quality=.*pass (the share that the kept|a number)"):
            ocvtp.build_pruner("fastervlm", quality=value)
    pruner = build_spec("fastervlm:quality=0.9", num_keep=4)
    assert (pruner.quality, pruner.num_keep, pruner.exact) == (0.9, 4, False)
    assert (
        ocvtp.build_pruner("fastervlm", quality=0.9).with_budget(Budget(num_keep=4)).num_keep == 4
    )
    with pytest.raises(ValueError, match="num_keep=4 and keep_ratio=0.5; pass exactly one"):
        ocvtp.build_pruner("ridge", quality=0.9, num_keep=4, keep_ratio=0.5)
    with pytest.raises(ValueError, match="pass exactly one of them, or max_keep"):
        ocvtp.build_pruner("fastervlm")
    with pytest.raises(ValueError, match="'divprune' has no setting 'quality'"):
        ocvtp.build_pruner("divprune", quality=0.9)
    assert NAMES == ["fastervlm", "prumerge", "prumerge_plus", "ridge", "trim"]
