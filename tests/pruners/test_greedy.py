"""Greedy methods keep the same whichever way rows come, and whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_contract import image, tokens_for

import ocvtp
from ocvtp.ops import similarity
from ocvtp.pruners import pruner_class

ROWS = ["cdpruner", "divprune", "greedyprune", "todre", "trimtokenator", "zspaprune"]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def projecting(tokens, projected):
    """The same tokens before the language model, and words that lie among them."""
    words = None if tokens.text is None else projected[:, 3:8]
    return replace(tokens, projected=projected, text=words)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_rows_and_pairs_keep_the_same(name, ties, ragged, monkeypatch):
    """Ties are of 16 signs: lengths and cosines are exact then, and only nine values differ."""
    pruner = ocvtp.build_pruner(name, num_keep=11)
    tokens = tokens_for(pruner, 3, (6, 6), ragged=ragged)
    if ties:
        tokens = projecting(tokens, draw(3, 36, 16).sign())
    kept = []
    for share, most in ((0, 0), (10**9, 10**9)):
        monkeypatch.setattr(similarity, "_ROWS_FOR_ALL", share)
        monkeypatch.setattr(similarity, "_MOST_TOKENS", most)
        found = pruner.select(tokens)
        kept.append((found.keep_indices.tolist(), found.counts().tolist()))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("num_keep", [3, 20])  # row by row, and from all pairs
@pytest.mark.parametrize("name", [*ROWS, "ridge", "scope"])
def test_near_ties_are_decided_alike_in_every_batch(name, num_keep):
    """Copies of six tokens that differ in their last bits."""
    pruner = ocvtp.build_pruner(name, num_keep=num_keep)
    tokens = tokens_for(pruner, 5, (8, 8))
    values = draw(5, 6, 64).repeat(1, 11, 1)[:, :64] * (1 + 1e-7 * draw(5, 64, 64))
    tokens = replace(projecting(tokens, values), features=values)
    together = pruner.select(tokens)
    for number in range(5):
        alone = pruner.select(image(tokens, number))
        assert alone.keep_indices[0].equal(together.keep_indices[number]), number


@pytest.mark.parametrize("name", [*ROWS, "ridge", "scope"])
def test_only_what_every_step_reads_takes_turns(name):
    pruner = ocvtp.build_pruner(name, num_keep=20)
    few, many = (pruner._takes_turns(count, 20) for count in (80, 8193))
    assert many
    assert few == (name in ("ridge", "scope"))
    assert not pruner_class("fopru")(num_keep=20)._takes_turns(8193, 20)
