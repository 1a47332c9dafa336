"""Tokens that pruners mix: `Selection.merge` under a host, against mixing by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import (
    BATCH,
    NUM_TOKENS,
    Scripted,
    ask,
    assert_close,
    make_batch,
    project,
    shorten,
)
from torch import Tensor

from ocvtp import Needs, Selection, VisualTokens, build_pruner
from ocvtp.ops.merging import merge

KEPT = [[1, 4, 5], [0, 2, 3], [7, 8, 15]]
ANCHORS = [[5, 1, 4], [2, 3, 0], [15, 8, 7]]
pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.sampled(2)]


@pytest.fixture
def inputs() -> Any:
    return make_batch(BATCH)


def weights(num_kept: int = 3, seed: int = 1) -> Tensor:
    """[I, K, 1 + N], a third of them 0."""
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(3, num_kept, 1 + NUM_TOKENS, generator=random)
    return values * (values > 0.33)


def states(model: Any, inputs: Any) -> Tensor:
    """[I, 1 + N, D] of the selected layer, the CLS first."""
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    return tower.hidden_states[-2]


def by_hand(model: Any, inputs: Any, mixed: Tensor, places: list[list[int]]) -> Any:
    """The short prompt with mixed tokens [I, K, D] in these places of their images."""
    projected = project(model, inputs["pixel_values"])
    for image, places_of_image in enumerate(places):
        rows = model.model.multi_modal_projector(mixed[image, : len(places_of_image)])
        projected[image, places_of_image] = rows
    return shorten(model, inputs, [sorted(p) for p in places], projected=projected)


def merging(merged: Tensor, anchors: Any = None, valid: Any = None, kept: Any = KEPT) -> Scripted:
    selection = Selection(torch.tensor(kept), valid=valid, merge=merged, anchors=anchors)
    return Scripted(wants=Needs(cls=True), choose=lambda tokens: selection)


def agrees(model: Any, inputs: Any, pruner: Scripted, short: Any, **options: Any) -> None:
    """forward() and generate() under the pruner are those of the short prompt."""
    kind = options.get("positions", "contiguous")
    positions = short.positions(kind) if kind == "original" else None
    real = short.mask.bool()
    with pruner(model, **options):
        assert_close(model(**inputs).logits[real], short.logits(positions)[real], 1e-5)
        assert torch.equal(ask(model, inputs), short.greedy(5, kind))


@torch.no_grad()
def test_rows_stand_in_the_order_of_the_paper(llava: Any, inputs: Any) -> None:
    merged = weights()
    short = by_hand(llava, inputs, merged @ states(llava, inputs), KEPT)
    agrees(llava, inputs, merging(merged, torch.tensor(ANCHORS)), short)


@torch.no_grad()
def test_rows_in_their_places_where_positions_are_kept(llava: Any, inputs: Any) -> None:
    merged = weights()
    mixed = merged @ states(llava, inputs)
    pruner = merging(merged, torch.tensor(ANCHORS))
    in_place = by_hand(llava, inputs, mixed, ANCHORS)
    agrees(llava, inputs, pruner, in_place, positions="original")
    prompts: list[Any] = []
    numbers = torch.arange(inputs["input_ids"].shape[1])[None]
    with pruner(llava, on_prune=prompts.append):  # so too with position_ids of the caller's
        logits = llava(**inputs, position_ids=numbers, use_cache=False).logits
    real = in_place.mask.bool()
    expected = in_place.logits(in_place.gather(numbers.expand(3, -1)))
    assert_close(logits[real], expected[real])
    assert torch.equal(prompts[0].selection.merge[0], merged[0, [1, 2, 0]])
    in_order = by_hand(llava, inputs, mixed, KEPT)
    with pruner(llava, positions="original"):
        logits = llava(**inputs).logits
    other = in_order.logits(in_order.positions("original"))
    assert (logits[real] - other[real]).abs().max() > 0.01


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@torch.no_grad()
def test_images_may_keep_different_numbers(llava: Any, inputs: Any, positions: Any) -> None:
    valid = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    kept, anchors = [[1, 4, 5], [2, 9, 9], [3, 7, 0]], [[5, 1, 4], [2, 0, 0], [7, 3, 1]]
    merged = weights()
    merged[~valid] = torch.nan  # nobody looks at it
    real = [row[: int(v.sum())] for row, v in zip(anchors, valid, strict=True)]
    mixed = merged @ states(llava, inputs)
    places = real if positions == "original" else [sorted(places) for places in real]
    short = by_hand(llava, inputs, mixed, places)
    pruner = merging(merged, torch.tensor(anchors), valid, kept)
    agrees(llava, inputs, pruner, short, positions=positions)


@torch.no_grad()
def test_tokens_left_as_they_are_are_exact(llava: Any, inputs: Any) -> None:
    everything = torch.eye(1 + NUM_TOKENS)[1:].repeat(3, 1, 1)
    pruner = merging(everything, kept=[list(range(NUM_TOKENS))] * 3)
    expected = llava(**inputs).logits
    with pruner(llava):
        assert_close(llava(**inputs).logits, expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        features = states(llava, inputs).to(dtype)
        features[0, 3] = -0.0
        features[1, 2, 5] = torch.inf  # a 0 beside it would be no number
        tokens = VisualTokens(features[:, 1:], (4, 4), cls=features[:, 0])
        with torch.autocast("cpu", torch.bfloat16):
            mixed = merge(tokens, torch.eye(1 + NUM_TOKENS).to(torch.float32).repeat(3, 1, 1))
        assert mixed.dtype == dtype
        assert torch.equal(mixed.view(torch.uint8), features.view(torch.uint8))


def test_mixtures_round_once() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(2, 576, 8, generator=random)
    weights = torch.rand(2, 5, 577, generator=random).softmax(dim=2)
    for dtype in (torch.bfloat16, torch.float16):
        tokens = VisualTokens(features.to(dtype), (24, 24))
        exact = weights[:, :, 1:].double() @ tokens.features.double()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = merge(tokens, weights)
        assert mixed.dtype == dtype
        facts = torch.finfo(dtype)
        off = (mixed.double() - exact).abs() / exact.abs().clamp(min=facts.smallest_normal)
        assert off.max() <= 0.55 * facts.eps


@torch.no_grad()
def test_half_precision_and_offloading(llava: Any, inputs: Any) -> None:
    from accelerate import cpu_offload

    model, merged = deepcopy(llava).bfloat16(), weights()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    mixed = (merged @ states(model, inputs).float()).bfloat16()
    short = by_hand(model, inputs, mixed, KEPT)
    real = short.mask.bool()
    pruner = merging(merged)
    with pruner(model):
        logits = model(**inputs).logits
    assert_close(logits[real], short.logits()[real], 0.02)
    offloaded = cpu_offload(deepcopy(model), execution_device="cpu")
    with pruner(offloaded):
        assert torch.equal(offloaded(**inputs).logits, logits)


def test_the_projector_learns_from_mixtures(llava: Any, inputs: Any) -> None:
    model, merged = deepcopy(llava), weights()
    merged[:, 0] = torch.eye(1 + NUM_TOKENS)[4]
    gradients = []
    short = by_hand(model, inputs, merged @ states(model, inputs), KEPT)
    short.logits()[short.mask.bool()].square().mean().backward()
    gradients.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
    model.zero_grad()
    with merging(merged)(model):
        logits = model(**inputs).logits[short.mask.bool()]
    logits.square().mean().backward()
    gradients.append(model.model.multi_modal_projector.linear_1.weight.grad)
    assert_close(gradients[1], gradients[0], 1e-4)


@torch.no_grad()
def test_without_a_cls_its_column_is_left_out(llava_siglip: Any, inputs: Any) -> None:
    merged = weights()
    merged[:, :, 0] = 0
    tower = llava_siglip.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    mixed = merged[:, :, 1:] @ tower.hidden_states[-2]
    short = by_hand(llava_siglip, inputs, mixed, KEPT)
    pruner = Scripted(choose=lambda tokens: Selection(torch.tensor(KEPT), merge=merged))
    agrees(llava_siglip, inputs, pruner, short)


@torch.no_grad()
def test_pruners_without_mixtures_have_no_order(llava: Any, inputs: Any) -> None:
    pruner = build_pruner("uniform", num_keep=4)
    selections: list[Any] = []
    for positions in ("contiguous", "original"):
        with pruner(llava, positions=positions, on_prune=selections.append):
            llava(**inputs)
    assert torch.equal(*(prompt.selection.keep_indices for prompt in selections))
