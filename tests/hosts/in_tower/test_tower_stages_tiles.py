"""Pruners before and inside the tower of LLaVA-NeXT and OneVision, against prompts made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import ask, assert_close
from reference_next import (
    BATCH,
    cells,
    lines,
    make_next,
    projected_tiles,
    shorten_next,
    single_next,
    sizes_of,
    split_tiles,
    tiles_of,
)
from reference_tower import make_pictures, normalised
from test_tower_stages import EVERY_STAGE, build, by_hand
from tiny_onevision import tiny_onevision

import ocvtp
from ocvtp import Compose, build_pruner

pytestmark = [pytest.mark.usefixtures("untouched_next"), pytest.mark.sampled(2)]


def make_inputs(rows: Any = BATCH, side: Any = "left") -> Any:
    """Tiles with redundant patches."""
    inputs = make_next(rows, side)
    pictures = make_pictures(inputs["pixel_values"].flatten(0, 1).shape[0])
    fresh = normalised(pictures).view_as(inputs["pixel_values"])
    padding = inputs["pixel_values"][:, :, :1, :1, :1] == 99
    inputs["pixel_values"] = torch.where(padding, inputs["pixel_values"], fresh)
    return inputs


def prompt_by_hand(model: Any, inputs: Any, kind: str, separators: str, side: Any = "left") -> Any:
    """Every tile on its own, then only those of its patches that unpadding leaves."""
    projected = torch.cat(projected_tiles(model, inputs)).detach()
    left = []
    for tile, pixels in enumerate(tiles_of(inputs)):
        places, states = by_hand(model, pixels, kind)
        with torch.no_grad():
            projected[tile, places] = model.model.multi_modal_projector(states)
        left.append(places)
    kept, first = [], 0
    by_image = split_tiles(projected, inputs)
    for size, tiles in zip(sizes_of(inputs), by_image, strict=True):
        kept.append([cell for cell in cells(size) if cell[1] in left[first + cell[0]]])
        first += len(tiles)
    return shorten_next(model, inputs, kept, separators, side, by_image), kept


@pytest.mark.parametrize(("side", "separators"), [("left", "rows"), ("right", "all")])
@pytest.mark.parametrize("kind", EVERY_STAGE)
def test_answers_are_those_of_prompts_made_by_hand(
    llava_next: Any, kind: str, side: Any, separators: Any
) -> None:
    inputs = make_inputs(side=side)
    short, kept = prompt_by_hand(llava_next, inputs, kind, separators, side)
    budget: Any = "per_image" if kind == "adaptive" else "per_tile"
    prompts: list[Any] = []
    settings = {"budget": budget, "separators": separators, "on_prune": prompts.append}
    with build(kind)(llava_next, **settings), torch.no_grad():
        logits = llava_next(**inputs).logits
        answer = ask(llava_next, inputs) if side == "left" else None
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-4)
    if answer is not None:
        assert answer.equal(short.greedy(5))
    summary = prompts[0].summary()
    assert sum(summary["visual_tokens_kept"]) == sum(map(len, kept))
    assert sum(summary["visual_tokens"]) == sum(len(cells(size)) for size in sizes_of(inputs))


@pytest.mark.parametrize("kind", EVERY_STAGE)
def test_a_batch_answers_as_its_rows_do(llava_next: Any, kind: str) -> None:
    inputs = make_inputs()
    with build(kind)(llava_next, budget="per_tile"):
        together = ask(llava_next, inputs)
        alone = [ask(llava_next, single_next(inputs, row)) for row in range(3)]
    assert together.equal(torch.cat(alone))


def test_keeping_all_is_the_bare_model(llava_next: Any) -> None:
    inputs = make_inputs()
    with torch.no_grad():
        bare = llava_next(**inputs).logits
        for kind in ("tome", "vprune", "early"):
            with build(kind, 16)(llava_next, budget="per_tile", separators="all"):
                assert_close(llava_next(**inputs).logits, bare, 1e-5)
            assert torch.equal(llava_next(**inputs).logits, bare)


def test_a_share_of_every_tile_then_a_budget_of_the_image(llava_next: Any) -> None:
    inputs, prompts = make_inputs(), []
    merge = build_pruner("tome", keep_ratio=0.5)
    both = Compose([merge, build_pruner("divprune", num_keep=6)])
    with both(llava_next, on_prune=prompts.append):
        together = ask(llava_next, inputs)
        alone = [ask(llava_next, single_next(inputs, row)) for row in range(3)]
    assert together.equal(torch.cat(alone))
    assert prompts[0].selection.counts().tolist() == [6, 6, 6]
    for size, count in zip(
        sizes_of(inputs), prompts[0].encoded.tokens.real.sum(dim=1), strict=True
    ):
        assert 8 <= count < len(cells(size))


def test_a_count_for_a_whole_image_is_refused(llava_next: Any) -> None:
    for kind in ("tome", "vprune", "early"):
        with pytest.raises(ValueError, match=r"budget='per_tile', or keep_ratio"):
            ocvtp.attach(llava_next, build(kind))


@pytest.mark.slow
def test_resized_tokens_are_refused() -> None:
    """What OneVision resizes are means of neighbours, of which some would be missing."""
    model = tiny_onevision()
    merge = build_pruner("tome", keep_ratio=0.5)
    sizes = [(56, 112)]
    pinpoints = model.config.image_grid_pinpoints
    ids = 16 + sum(len(line) + 1 for line in lines(sizes[0], pinpoints))
    inputs = {
        "input_ids": torch.tensor([[1, *[100] * ids, 5]]),
        "pixel_values": torch.randn(1, 3, 3, 56, 56),
        "image_sizes": torch.tensor(sizes),
    }
    prompts: list[Any] = []
    with merge(model, on_prune=prompts.append):
        assert ask(model, inputs).shape == (1, 5)
    assert prompts[0].summary()["visual_tokens"] == [48]
    assert prompts[0].summary()["visual_tokens_kept"] == [24]
    large = {
        "pixel_values": torch.randn(1, 17, 3, 56, 56),
        "image_sizes": torch.tensor([[224, 224]]),
    }
    with merge(model), pytest.raises(ValueError, match="drops tokens before or inside the tower"):
        model(**inputs | large)
