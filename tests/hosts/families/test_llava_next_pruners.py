"""Every registered pruner on LLaVA-NeXT, against tokens and prompts that were put together by hand.

I images, T tiles of all images, U views that pruners see, M tokens of a view.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from reference import ask, assert_close
from reference_next import (
    IMG,
    NUM_TOKENS,
    Cell,
    cells,
    lines,
    make_next,
    num_tiles,
    shorten_next,
    single_next,
    sizes_of,
    split_tiles,
    tiles_of,
    views,
)
from test_llava_pruners import CASES, OWN, ROWS, build, tokens_by_hand
from tiny_models import tiny_clip, tiny_processor
from torch import Tensor

import ocvtp
from ocvtp import Selection, VisualTokens
from ocvtp.hosts.prompt.user_words import Prompts

pytestmark = pytest.mark.usefixtures("untouched_next")
PER_VIEW = ("cls", "cls_keys", "cls_queries", "text", "text_valid", "clip_text")
# which tokens of several tiles are not
ON_GRIDS = [("pool", {}), ("surprise", {}), ("fopru", {"strategy": "row"})]
View = tuple[int, list[Cell]]
"""Image, and the cells of it that a pruner sees as one."""


@pytest.fixture(scope="module")
def next_clip(llava_next: Any) -> Any:
    return tiny_clip(llava_next.model.vision_tower)


@pytest.fixture
def reading(next_clip: Any) -> dict[str, Any]:
    return {"processor": tiny_processor(), "text_tower": next_clip}


def make_prompts(side: str = "left") -> Any:
    """`ROWS` about three images of different sizes."""
    inputs = make_next([(IMG,), (IMG, IMG)])
    sizes = iter(sizes_of(inputs))
    text = []
    for row in ROWS:
        first, *rest = row.split("<image>")
        for part in rest:
            size = next(sizes)
            first += "<image>" * (len(cells(size)) + len(lines(size))) + part
        text.append(first)
    tokenizer = tiny_processor().tokenizer
    tokenizer.padding_side = side
    made = tokenizer(text, padding=True, return_tensors="pt")
    return inputs | {name: made[name] for name in ("input_ids", "attention_mask")}


def views_of(inputs: Any, budget: str) -> list[View]:
    return [(i, view) for i, size in enumerate(sizes_of(inputs)) for view in views(size, budget)]


def seen_by_hand(tiled: VisualTokens, inputs: Any, budget: str) -> VisualTokens:
    """What a pruner is shown of tiles [T, N, ...]; padding is 0."""
    shown = views_of(inputs, budget)
    most = max(len(view) for _, view in shown) if budget == "per_image" else NUM_TOKENS
    valid = torch.zeros(len(shown), most, dtype=torch.bool)

    def gathered(name: str, values: Tensor) -> Tensor:
        by_image = split_tiles(values, inputs)
        if name in PER_VIEW:
            return torch.stack([by_image[i][view[0][0]] for i, view in shown])
        found = values.new_zeros(len(shown), most, *values.shape[2:])
        for number, (image, view) in enumerate(shown):
            for k, cell in enumerate(view):
                place = cell[1] if budget == "per_tile" else k
                found[number, place] = by_image[image][cell]
                valid[number, place] = True
        return found

    changed: dict[str, Any] = {}
    for field in fields(tiled):
        value = getattr(tiled, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = gathered(field.name, value)
        elif isinstance(value, dict):
            changed[field.name] = {k: gathered(field.name, v) for k, v in value.items()}
    return replace(tiled, **changed, valid=valid)


def read_by_hand(
    model: Any, tokens: VisualTokens, selection: Selection, inputs: Any, budget: str
) -> tuple[list[list[Cell]], list[Tensor]]:
    """The kept cells of each image, and what the language model reads there [tiles, N, D']."""
    selection = selection.in_raster_order()
    sizes = sizes_of(inputs)
    kept: list[list[Cell]] = [[] for _ in sizes]
    rows = [torch.zeros(num_tiles(size), NUM_TOKENS, 48) for size in sizes]
    for number, (image, view) in enumerate(views_of(inputs, budget)):
        places = [cell[1] if budget == "per_tile" else k for k, cell in enumerate(view)]
        cell_at = dict(zip(places, view, strict=True))
        for k, place in enumerate(selection.keep_indices[number].tolist()):
            if selection.valid is not None and not selection.valid[number, k]:
                continue
            kept[image].append(cell_at[place])
            row = tokens.projected[number, place]
            if selection.merge is not None:
                states = torch.cat([tokens.cls[number : number + 1], tokens.features[number]])
                row = model.model.multi_modal_projector(selection.merge[number, k] @ states)
            rows[image][cell_at[place]] = row
    return kept, rows


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["per_image", "per_tile"])
@pytest.mark.parametrize(("name", "settings"), CASES)
@torch.no_grad()
def test_answers_are_those_of_prompts_made_by_hand(
    llava_next: Any,
    next_clip: Any,
    reading: Any,
    budget: Any,
    name: str,
    settings: dict[str, Any],
) -> None:
    pruner, inputs = build(name, **settings), make_prompts()
    own = [OWN[i] for i, size in enumerate(sizes_of(inputs)) for _ in range(num_tiles(size))]
    patch = pruner.needs.patch_queries
    processor, tiles = reading["processor"], tiles_of(inputs)
    tiled = tokens_by_hand(llava_next, next_clip, processor, tiles, patch, own)
    tokens = seen_by_hand(tiled, inputs, budget)
    prompts: list[Any] = []
    with pruner(llava_next, budget=budget, on_prune=prompts.append, **reading):
        if budget == "per_image" and (name, settings) in ON_GRIDS:
            with pytest.raises(ValueError, match="grid"):
                llava_next(**inputs)
            return
        expected = pruner.select(tokens)
        logits = llava_next(**inputs).logits
        answer = ask(llava_next, inputs)
    found = prompts[0].selection
    real = torch.ones_like(found.keep_indices).bool() if found.valid is None else found.valid
    assert real.equal(torch.ones_like(real) if expected.valid is None else expected.valid)
    assert found.keep_indices[real].equal(expected.keep_indices[real])
    kept, rows = read_by_hand(llava_next, tokens, expected, inputs, budget)
    short = shorten_next(llava_next, inputs, kept, projected=rows)
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-4)
    assert answer.equal(short.greedy(5))


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["per_image", "per_tile"])
@pytest.mark.parametrize(
    "name", [n for n in ocvtp.list_pruners("llm_input") if n not in ("random", "pool", "surprise")]
)
def test_a_batch_answers_as_its_rows_do(
    llava_next: Any, reading: Any, budget: Any, name: str
) -> None:
    pruner, inputs = build(name), make_prompts()
    with pruner(llava_next, budget=budget, **reading):
        together = ask(llava_next, inputs)
        alone = [ask(llava_next, single_next(inputs, row)) for row in range(3)]
    assert together.equal(torch.cat(alone))


@torch.no_grad()
def test_tiles_do_not_count_as_images_of_a_prompt(
    llava_next: Any, reading: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates write other things around one image than around several."""
    seen, words = [], Prompts.words

    def spy(self: Prompts, ids: Tensor, real: Tensor, num_images: Any) -> Tensor:
        seen.append(list(num_images))
        return words(self, ids, real, num_images)

    monkeypatch.setattr(Prompts, "words", spy)
    for budget in ("per_image", "per_tile"):
        with build("cdpruner")(llava_next, budget=budget, **reading):
            llava_next(**make_prompts())
    assert seen == [[1, 2], [1, 2]]
