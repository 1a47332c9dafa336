"""InternVL's prompts pruned by hand: patches put together and tokens dropped by plain loops.

T tiles of a batch, N = 16 tokens of a tile, D width of the tower, D' of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from reference import IMG, Inputs, Short, Side, _pad, shorten, tower_states
from tiny_internvl import IMG_END, IMG_START
from tiny_models import BOS, IMAGE_TOKEN, PAD
from torch import Tensor

Cell = tuple[int, int]
"""Tile, counted over the batch, and token."""
SIDE, NUM_TOKENS = 4, 16
TILES = [3, 1, 5, 2]
"""Tiles of the images in turn; the last is the thumbnail."""
ONE = [(5, IMG, 4)]
SEVERAL = [(5, IMG, 3, IMG, IMG, 4)]
BATCH = [(5, IMG, 4), (9,), (3, IMG, 2, IMG, 6)]


def make_internvl(
    rows: Sequence[tuple[int | str, ...]], side: Side = "left", tiles: Sequence[int] = TILES
) -> Inputs:
    """What a processor returns; images have so many tiles in turn."""
    random = torch.Generator().manual_seed(0)
    prompts, used = [], []
    for row in rows:
        ids = [BOS]
        for part in row:
            if part == IMG:
                used.append(tiles[len(used) % len(tiles)])
                ids += [IMG_START, *[IMAGE_TOKEN] * (used[-1] * NUM_TOKENS), IMG_END]
            else:
                ids += torch.randint(3, 99, (int(part),), generator=random).tolist()
        prompts.append(ids)
    length = max(map(len, prompts))
    ids = torch.stack([_pad(torch.tensor(p), length, side, PAD) for p in prompts])
    mask = torch.stack([_pad(torch.ones(len(p)).long(), length, side, 0) for p in prompts])
    pixels = torch.randn(sum(used), 3, 56, 56, generator=random)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def tiles_of(inputs: Inputs, row: int | None = None) -> list[int]:
    """Tiles of every image of the batch, or of one row."""
    found = []
    for ids in inputs["input_ids"] if row is None else inputs["input_ids"][row : row + 1]:
        before = None
        for token in ids.tolist():
            if token == IMAGE_TOKEN:
                if before != IMAGE_TOKEN:
                    found.append(0)
                found[-1] += 1
            before = token
    return [count // NUM_TOKENS for count in found]


def single_internvl(inputs: Inputs, row: int) -> Inputs:
    """One row of a batch, without its padding."""
    real = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    first = sum(sum(tiles_of(inputs, other)) for other in range(row))
    if own := sum(tiles_of(inputs, row)):
        alone["pixel_values"] = inputs["pixel_values"][first : first + own]
    return alone


def views(inputs: Inputs, budget: str) -> list[list[Cell]]:
    """What a pruner sees as one image: its tokens in the order in which they are read."""
    found, tile = [], 0
    for count in tiles_of(inputs):
        own = [[(t, n) for n in range(NUM_TOKENS)] for t in range(tile, tile + count)]
        found += own if budget == "per_tile" else [[cell for part in own for cell in part]]
        tile += count
    return found


def units(patches: Tensor) -> Tensor:
    """[T, 64, ...] -> [T, 16, 4, ...]: the 2 x 2 patches of every token."""
    found = []
    for row in range(SIDE):
        for column in range(SIDE):
            corner = 2 * SIDE * 2 * row + 2 * column
            own = [corner, corner + 1, corner + 2 * SIDE, corner + 2 * SIDE + 1]
            found.append(patches[:, own])
    return torch.stack(found, dim=1)


def selected(model: Any, pixels: Tensor) -> Tensor:
    """[T, 65, D] the layer that the language model reads."""
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    layer = model.config.vision_feature_layer
    return output.last_hidden_state if layer == -1 else output.hidden_states[layer]


def features(model: Any, pixels: Tensor) -> Tensor:
    """[T, N, 4 D] what goes to the projector."""
    return units(selected(model, pixels)[:, 1:]).flatten(2)


def projected(model: Any, pixels: Tensor) -> Tensor:
    """[T, N, D'] what the language model reads."""
    return model.model.multi_modal_projector(features(model, pixels))


def best_cells(model: Any, inputs: Inputs, num_keep: int, budget: str) -> list[Cell]:
    """Of each image, or of each tile, the cells that the CLS of block -2 likes most."""
    _, attentions = tower_states(model, inputs["pixel_values"])
    scores = units(attentions[-2].mean(dim=1)[:, 0, 1:]).mean(dim=2)  # [T, N]
    kept: list[Cell] = []
    for view in views(inputs, budget):
        kept += sorted(view, key=lambda cell: -float(scores[cell]))[:num_keep]
    return kept


def shorten_internvl(
    model: Any,
    inputs: Inputs,
    kept: Sequence[Cell],
    side: Side = "left",
    rows: Tensor | None = None,
) -> Short:
    """Drop all tokens but `kept`, whose rows are those of `rows` [T, N, D'] or the model's."""
    if rows is None:
        rows = projected(model, inputs["pixel_values"])
    by_tile = [sorted(n for t, n in kept if t == tile) for tile in range(len(rows))]
    return shorten(model, inputs, by_tile, side, rows)
