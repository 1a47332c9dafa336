"""Pruners of one stage, one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_contract import NoSync, make_tokens
from torch.testing import assert_close

import ocvtp
from ocvtp import Chain, build_pruner
from ocvtp.pruners.methods.fastervlm import FasterVLM

GRID = (5, 7)


def cut(tokens, b, keep):
    """One image with the kept tokens only."""
    return tokens.map(lambda t: t[b : b + 1]).map(
        lambda t: t[:, keep] if t.ndim > 1 and t.shape[1] == 35 else t
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "last", ["divprune", "vispruner", "visionzip", "prumerge", "cdpruner", "zspaprune", "uniform"]
)
def test_the_second_chooses_from_what_the_first_has_left(last, ragged):
    first, second = build_pruner("fastervlm", num_keep=20), build_pruner(last, num_keep=6)
    chain = Chain([first, second])
    tokens = make_tokens(chain.needs, 4, GRID, ragged=ragged)
    with NoSync():
        selection = chain.select(tokens)
    for b, before in enumerate(first.select(tokens).keep_indices):
        if tokens.valid is not None:  # images with fewer than 20 tokens keep padding, marked
            before = before[tokens.valid[b, before]]
        left = cut(tokens, b, before)
        alone = second.select(replace(left, valid=None))
        assert selection.keep_indices[b].tolist() == before[alone.keep_indices[0]].tolist()
        if alone.merge is not None:
            states = [torch.zeros(1, 8) if tokens.cls is None else tokens.cls[b : b + 1]]
            mixed = selection.merge[b] @ torch.cat([*states, tokens.features[b]])
            assert_close(mixed, alone.merge[0] @ torch.cat([*states, left.features[0]]))
            assert sorted(selection.anchors[b].tolist()) == selection.keep_indices[b].tolist()


def test_three_steps_and_shares():
    chain = Chain(
        [
            build_pruner("fastervlm", keep_ratio=0.8),
            build_pruner("divprune", keep_ratio=0.5),
            build_pruner("uniform", num_keep=3),
        ]
    )
    tokens = make_tokens(chain.needs, 2, GRID)
    assert chain.select(tokens).keep_indices.shape == (2, 3)
    assert chain.name == "fastervlm>divprune>uniform"
    assert chain.stage == "llm_input"


def test_on_a_model(llava):
    chain = Chain([build_pruner("fastervlm", num_keep=9), build_pruner("divprune", num_keep=4)])
    prompts = []
    inputs = {
        "input_ids": torch.tensor([[1, 5] + [100] * 16 + [7, 8]]),
        "pixel_values": torch.randn(1, 3, 56, 56),
    }
    with ocvtp.Compose([chain])(llava, on_prune=prompts.append), torch.no_grad():
        assert llava(**inputs).logits.shape[1] == 8
    assert prompts[0].selection.keep_indices.shape == (1, 4)


def late():
    class Late(FasterVLM):
        stage = "llm_layers"

    return Late(num_keep=2)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "0 pruners; pass two or more"),
        ([build_pruner("uniform", num_keep=2)], "1 pruners; pass two or more"),
        ([build_pruner("uniform", num_keep=2), late()], "stages llm_input, llm_layers"),
        ([build_pruner("pool", num_keep=4), build_pruner("uniform", num_keep=2)], "put it last"),
    ],
)
def test_refusals(steps, message):
    with pytest.raises(ValueError, match=message):
        Chain(steps)


def test_the_grid_is_gone_after_the_first_step():
    chain = Chain([build_pruner("uniform", num_keep=20), build_pruner("pool", num_keep=4)])
    with pytest.raises(ValueError, match="reads the grid"):
        chain.select(make_tokens(chain.needs, 1, GRID))


def test_a_budget_that_grows_is_refused():
    uniform, cls = build_pruner("uniform", num_keep=4), build_pruner("fastervlm", num_keep=9)
    half = build_pruner("uniform", keep_ratio=0.5)
    message = "Chain got 'fastervlm' with num_keep=9 after 'uniform', which leaves 4"
    for steps in ([uniform, cls], [uniform, half, cls]):
        with pytest.raises(ValueError, match=message):
            Chain(steps)


def test_small_images_are_kept_whole():
    first, last = build_pruner("uniform", num_keep=40), build_pruner("prumerge", num_keep=20)
    chain = Chain([first, last])
    tokens = make_tokens(chain.needs, 1, (4, 4))
    selection = chain.select(tokens)
    assert selection.keep_indices.tolist() == [list(range(16))]
    assert selection.merge is None
    shares = Chain([build_pruner("uniform", keep_ratio=0.5), build_pruner("fastervlm", num_keep=9)])
    for count, kept in ((12, 6), (16, 8), (30, 9)):
        alone = make_tokens(shares.needs, 1, (count, 1))
        for chain in (shares, shares.of_size(count)):
            assert chain.select(alone).counts().tolist() == [kept]
