"""DART against the official code's vectors and plain loops."""

from __future__ import annotations

from dataclasses import replace

import naive_layers as naive
import pytest
import torch

import ocvtp
from ocvtp.pruners.layer_pruner import LayerStage
from ocvtp.structures import LayerTokens, VisualTokens


def make_tokens(keys, normed, start, count):
    """[B, L, D] of a whole prompt: what stands behind the image is text."""
    image, text = slice(start, start + count), slice(start + count, None)
    batch = len(keys)
    return LayerTokens(
        features=torch.zeros_like(normed[:, image]),
        grid_hw=(1, count),
        places=torch.arange(count).expand(batch, -1),
        keys={1: keys[:, image]},
        text=torch.zeros_like(normed[:, text]),
        text_valid=torch.ones(normed[:, text].shape[:2], dtype=torch.bool),
        text_keys={1: keys[:, text]},
        normed={"final": normed[:, image]},
        text_normed={"final": normed[:, text]},
    )


@pytest.fixture
def official(vectors):
    """The vectors, and tokens of them."""
    reference = vectors("dart")
    keys = reference["keys"].transpose(1, 2).flatten(2)  # heads side by side
    start, count = int(reference["image_start"]), int(reference["image_len"])
    return reference, make_tokens(keys, reference["last_state_normed"], start, count)


@pytest.mark.parametrize("num_taken", [16, 24, 32])
def test_legacy_order_is_the_official_one(official, num_taken):
    reference, tokens = official
    start, num_keep = int(reference["image_start"]), 4 + num_taken
    pruner = ocvtp.build_pruner("dart", stages=((2, num_keep),), legacy=True, legacy_start=start)
    kept = pruner.select_at(tokens, 2, num_keep).keep_indices[0] + start
    assert kept.tolist() == reference[f"T{num_taken}.keep_sorted"].tolist()


@pytest.mark.parametrize("num_keep", [20, 28, 36, 37, 43, 5, 4, 2, 63, 64])
def test_ascending_order_equals_plain_loops(official, num_keep):
    _, tokens = official
    pruner = ocvtp.build_pruner("dart", stages=((2, num_keep),))
    kept = pruner.select_at(tokens, 2, num_keep).keep_indices[0].tolist()
    one = tokens.map(lambda t: t[0])
    states = one.normed["final"], one.text_normed["final"]
    assert kept == naive.dart(one.keys[1], one.text_keys[1], *states, num_keep)


def test_images_with_little_text_share_among_fewer_pivots():
    generator = torch.Generator().manual_seed(0)
    keys, normed = (torch.randn(3, 40, 8, generator=generator) for _ in range(2))
    tokens = make_tokens(keys, normed, 0, 30)
    lengths = [10, 2, 1]
    tokens = replace(tokens, text_valid=torch.arange(10) < torch.tensor(lengths)[:, None])
    pruner = ocvtp.build_pruner("dart", stages=((2, 17),))
    kept = pruner.select_at(tokens, 2, 17).keep_indices
    for b, length in enumerate(lengths):
        text = slice(30, 30 + length)
        states = normed[b, :30], normed[b, text]
        assert kept[b].tolist() == naive.dart(keys[b, :30], keys[b, text], *states, 17)


def test_schedule():
    pruner = ocvtp.build_pruner("dart", num_keep=192)
    assert pruner.schedule(32, 576) == (LayerStage(2, 166),)
    assert pruner.positions == "original"
    assert ocvtp.build_pruner("dart", stages=((5, 0.5),)).schedule(32, 576) == (LayerStage(5, 288),)


def test_what_makes_no_sense_is_refused(official):
    with pytest.raises(ValueError, match="dart drops tokens once"):
        ocvtp.build_pruner("dart", stages=((2, 9), (4, 3)))
    with pytest.raises(ValueError, match="image_pivots=0, text_pivots=4; pass at least 1 and 0"):
        ocvtp.build_pruner("dart", num_keep=9, image_pivots=0)
    tokens = official[1]
    bare = VisualTokens(tokens.features, tokens.grid_hw, keys=tokens.keys, text=tokens.text)
    with pytest.raises(ValueError, match="give it LayerTokens"):
        ocvtp.build_pruner("dart", num_keep=9).select(bare)
