"""What pruners are shown of the tower, against its own eager attentions and hidden states."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import (
    BATCH,
    NUM_TOKENS,
    Scripted,
    assert_close,
    best_by_cls,
    first_patch,
    make_batch,
    num_registers,
    project,
    shorten,
    tower_states,
)
from reference_tower import queries_and_keys
from tiny_models import DINOS, tiny_llava

from ocvtp import Needs, VisualTokens, build_pruner
from ocvtp.towers import taps

BLOCKS = (0, 3, 5, -1, -2, -6)
pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.sampled(4)]


@pytest.fixture(scope="module", params=["clip", "siglip", *DINOS])
def model(request: pytest.FixtureRequest) -> Any:
    names = {"clip": "llava", "siglip": "llava_siglip"}
    if (name := names.get(request.param)) is not None:
        return request.getfixturevalue(name)
    return tiny_llava(request.param)


def has_cls(model: Any) -> bool:
    return model.config.vision_feature_select_strategy == "default"


def shown(model: Any, needs: Needs) -> tuple[VisualTokens, torch.Tensor]:
    """What a pruner of these needs sees, and the images."""
    pruner, inputs = Scripted(wants=needs), make_batch(BATCH, registers=num_registers(model))
    with pruner(model), torch.no_grad():
        model(**inputs)
    return pruner.seen[0], inputs["pixel_values"]


@pytest.mark.parametrize(
    "chunk_bytes", [64 * 2**20, 1, 4 * 3 * 4 * 17 * 5], ids=["whole", "row", "5_rows"]
)
def test_attention_equals_the_eager_towers(
    model: Any, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "_CHUNK_BYTES", chunk_bytes)
    first = first_patch(model)
    kinds = ("received", "given", "cls")[: 2 + has_cls(model)]
    needs = Needs(attention=tuple((block, kind) for block in BLOCKS for kind in kinds))
    eager = deepcopy(model)
    eager.model.vision_tower.set_attn_implementation("eager")
    tokens, images = shown(eager, needs)
    fast, _ = shown(model, needs)
    _, attentions = tower_states(model, images)
    assert tokens.attention.keys() == set(needs.attention)
    for block, kind in needs.attention:
        weights = attentions[block].mean(dim=1)  # [I, T, T]
        expected = {
            "cls": weights[:, 0, first:],
            "received": weights.mean(dim=1)[:, first:],
            "given": weights[:, first:, first:].mean(dim=2),
        }[kind]
        actual = tokens.attention[block, kind]
        assert actual.dtype == torch.float32
        assert (actual - expected).abs().max() <= 1e-6
        assert_close(fast.attention[block, kind], expected, 5e-5)  # of another tower's rounding


def test_received_attention_may_leave_the_cls_query_out(model: Any) -> None:
    first = first_patch(model)
    kinds = ("received", "given", "cls")[: 2 + has_cls(model)]
    asked = tuple((block, kind) for block in BLOCKS for kind in kinds)
    tokens, images = shown(model, Needs(attention=asked, patch_queries=True))
    _, attentions = tower_states(model, images)
    for block, kind in asked:
        weights = attentions[block].mean(dim=1)  # [I, T, T]
        expected = {
            "cls": weights[:, 0, first:],
            "received": weights[:, first:].mean(dim=1)[:, first:],
            "given": weights[:, first:, first:].mean(dim=2),
        }[kind]
        assert_close(tokens.attention[block, kind], expected, 5e-5)
    everything, _ = shown(model, Needs(attention=asked))
    same = assert_close if not first else differ
    same(tokens.attention[-2, "received"], everything.attention[-2, "received"])


def differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() > 1e-3 * b.abs().max()


def test_hidden_layers_equal_the_towers(model: Any) -> None:
    layers = (0, 1, 4, 6, -1, -2, -7)
    tokens, images = shown(model, Needs(hidden=layers))
    with torch.no_grad():
        states = model.model.vision_tower(images, output_hidden_states=True).hidden_states
    assert tokens.hidden.keys() == set(layers)
    for layer in layers:
        assert torch.equal(tokens.hidden[layer], states[layer][:, first_patch(model) :])


def test_tokens_hold_what_was_asked_for_and_no_more(model: Any) -> None:
    tokens, images = shown(model, Needs())
    with torch.no_grad():
        states = model.model.vision_tower(images, output_hidden_states=True).hidden_states
    assert torch.equal(tokens.features, states[-2][:, first_patch(model) :])
    assert tokens.grid_hw == (4, 4)
    assert tokens.num_heads == 4
    nothing = (tokens.cls, tokens.projected, tokens.text, tokens.valid, tokens.clip_visual)
    assert nothing == (None,) * 5
    assert (tokens.hidden, tokens.attention, tokens.keys) == ({}, {}, {})


def test_projected_tokens_are_what_the_language_model_reads(model: Any) -> None:
    tokens, images = shown(model, Needs(projected=True))
    assert tokens.projected is not None
    assert torch.equal(tokens.projected, project(model, images)[:, num_registers(model) :])
    assert tokens.projected.shape == (3, NUM_TOKENS, 48)


def test_keys_give_the_attention_of_the_tower(model: Any) -> None:
    """But for the registers, and of DINOv3 for the turns."""
    tokens, images = shown(model, Needs(keys=(2, -1)))
    _, attentions = tower_states(model, images)
    if num_registers(model):
        return check_keys(model, tokens, images)
    for block in (2, -1):
        assert tokens.keys[block].shape == (3, NUM_TOKENS, 32)
        if not has_cls(model):
            assert tokens.cls_keys == {}
            continue
        keys = torch.cat([tokens.cls_keys[block][:, None], tokens.keys[block]], dim=1)
        heads = keys.unflatten(-1, (4, 8)).transpose(1, 2)  # [I, H, T, d]
        query = tokens.cls_queries[block].unflatten(-1, (4, 8))[:, :, None]
        scores = (query @ heads.transpose(-1, -2)) * 8**-0.5
        assert_close(scores.softmax(dim=-1)[:, :, 0], attentions[block][:, :, 0], 1e-5)


def check_keys(model: Any, tokens: VisualTokens, images: torch.Tensor) -> None:
    """They are what the tower projects."""
    states, _ = tower_states(model, images)
    first, tower = first_patch(model), model.model.vision_tower
    for block in (2, -1):
        with torch.no_grad():
            queries, keys = queries_and_keys(tower, block, states[block - (block < 0)])
        assert_close(tokens.keys[block], keys[:, first:], 1e-5)
        assert_close(tokens.cls_keys[block], keys[:, 0], 1e-5)
        assert_close(tokens.cls_queries[block], queries[:, 0], 1e-5)


def test_the_cls_is_the_selected_layers(llava: Any) -> None:
    tokens, images = shown(llava, Needs(cls=True))
    states = llava.model.vision_tower(images, output_hidden_states=True).hidden_states
    assert tokens.cls is not None
    assert torch.equal(tokens.cls, states[-2][:, 0])


def test_layers_may_be_chosen_in_a_call(llava: Any) -> None:
    pruner, inputs = Scripted(), make_batch(BATCH)
    with pruner(llava), torch.no_grad():
        llava(**inputs, vision_feature_layer=3)
        states = llava.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    assert torch.equal(pruner.seen[0].features, states.hidden_states[3][:, 1:])


@torch.no_grad()
def test_towers_of_several_selected_layers() -> None:
    model = tiny_llava("clip", vision_feature_layer=[1, -2])
    inputs = make_batch(BATCH)
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    both = torch.cat([states.hidden_states[layer][:, 1:] for layer in (1, -2)], dim=-1)
    projected = model.model.multi_modal_projector(both)
    kept = best_by_cls(model, inputs["pixel_values"], 5)
    short = shorten(model, inputs, kept, projected=projected)
    with build_pruner("fastervlm", num_keep=5)(model):
        assert_close(model(**inputs).logits[short.mask.bool()], short.logits()[short.mask.bool()])
