"""LLaVA-NeXT's prompts pruned by hand: which token of which tile is read where, by plain loops.

I images of a batch, T tiles of all images, N = 16 tokens of a tile, D' width of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from reference import IMG, Inputs, Short, Side, _pad, tower_states
from tiny_models import BOS, IMAGE_TOKEN, PAD
from tiny_next import PINPOINTS
from torch import Tensor

Cell = tuple[int, int]
"""Tile (0 is the base view) and token."""
SIDE, NUM_TOKENS = 4, 16
SIZES = [(90, 140), (140, 60), (33, 33), (200, 61)]
"""Heights and widths: landscape, portrait, square, odd."""
ONE = [(5, IMG, 4)]
SEVERAL = [(5, IMG, 3, IMG, IMG, 4)]
BATCH = [(5, IMG, 4), (9,), (3, IMG, 2, IMG, 6)]


def tile_grid(
    size: tuple[int, int], pinpoints: Sequence[Sequence[int]] = PINPOINTS
) -> tuple[int, int]:
    """Rows and columns of tiles: where least is lost of an image, and then least is wasted."""

    def score(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[0] / size[0], pinpoint[1] / size[1])
        area = int(size[0] * scale) * int(size[1] * scale)
        used = min(area, size[0] * size[1])
        return used, used - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=score)
    return best[0] // 56, best[1] // 56


def lines(
    size: tuple[int, int], pinpoints: Sequence[Sequence[int]] = PINPOINTS
) -> list[list[Cell]]:
    """The tokens of each line of an image's tiles, those of the padding left out."""
    tile_rows, tile_columns = tile_grid(size, pinpoints)
    height, width = SIDE * tile_rows, SIDE * tile_columns
    top = left = 0
    if size[1] / size[0] > width / height:
        top = (height - int(round(size[0] * width / size[1], 7))) // 2
    else:
        left = (width - int(round(size[1] * height / size[0], 7))) // 2
    found = []
    for y in range(top, height - top):
        line = []
        for x in range(left, width - left):
            tile = 1 + (y // SIDE) * tile_columns + x // SIDE
            line.append((tile, (y % SIDE) * SIDE + x % SIDE))
        found.append(line)
    return found


def cells(size: tuple[int, int]) -> list[Cell]:
    """All tokens of an image in the order in which they are read, without the newlines."""
    base = [(0, token) for token in range(NUM_TOKENS)]
    return base + [cell for line in lines(size) for cell in line]


def num_tiles(size: tuple[int, int]) -> int:
    rows, columns = tile_grid(size)
    return 1 + rows * columns


def views(size: tuple[int, int], budget: str) -> list[list[Cell]]:
    """What a pruner sees as one image: all, or the tokens of one tile."""
    everything = cells(size)
    if budget == "per_image":
        return [everything]
    tiles = (sorted(c for c in everything if c[0] == tile) for tile in range(num_tiles(size)))
    return [tile for tile in tiles if tile]


def make_next(
    rows: Sequence[tuple[int | str, ...]],
    side: Side = "left",
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Inputs:
    """What a processor returns; images have these sizes in turn."""
    random = torch.Generator().manual_seed(0)
    prompts, used = [], []
    for row in rows:
        ids = [BOS]
        for part in row:
            if part == IMG:
                used.append(sizes[len(used) % len(sizes)])
                ids += [IMAGE_TOKEN] * (len(cells(used[-1])) + len(lines(used[-1])))
            else:
                ids += torch.randint(3, 99, (int(part),), generator=random).tolist()
        prompts.append(ids)
    length = max(map(len, prompts))
    inputs = {
        "input_ids": torch.stack([_pad(torch.tensor(p), length, side, PAD) for p in prompts]),
        "attention_mask": torch.stack(
            [_pad(torch.ones(len(p)).long(), length, side, 0) for p in prompts]
        ),
    }
    if used:
        most = max(map(num_tiles, used))
        pixels = torch.full((len(used), most, 3, 56, 56), 99.0)  # padding that would be noticed
        for image, size in enumerate(used):
            real = torch.randn(num_tiles(size), 3, 56, 56, generator=random)
            pixels[image, : len(real)] = real
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(used)}
    return inputs


def sizes_of(inputs: Inputs) -> list[tuple[int, int]]:
    return [(height, width) for height, width in inputs["image_sizes"].tolist()]


def single_next(inputs: Inputs, row: int) -> Inputs:
    """One row of a batch, without its padding columns and tiles."""
    real = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    sizes, first = sizes_of(inputs), 0
    for other in range(row + 1):
        left, last = int((inputs["input_ids"][other] == IMAGE_TOKEN).sum()), first
        while left:
            left -= len(cells(sizes[last])) + len(lines(sizes[last]))
            last += 1
        first, previous = last, first
    if first > previous:
        most = max(map(num_tiles, sizes[previous:first]))
        alone["pixel_values"] = inputs["pixel_values"][previous:first, :most]
        alone["image_sizes"] = inputs["image_sizes"][previous:first]
    return alone


def tiles_of(inputs: Inputs) -> Tensor:
    """[T, 3, 56, 56] without the padding tiles."""
    pairs = zip(inputs["pixel_values"], sizes_of(inputs), strict=True)
    return torch.cat([image[: num_tiles(size)] for image, size in pairs])


def split_tiles(values: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """[T, ...] by image."""
    return values.split([num_tiles(size) for size in sizes_of(inputs)])


def projected_tiles(model: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """[tiles, N, D'] of each image."""
    states = model.model.vision_tower(tiles_of(inputs), output_hidden_states=True).hidden_states
    has_cls = model.config.vision_feature_select_strategy == "default"
    features = states[model.config.vision_feature_layer][:, int(has_cls) :]
    return split_tiles(model.model.multi_modal_projector(features), inputs)


def best_cells(model: Any, inputs: Inputs, num_keep: int, budget: str) -> list[list[Cell]]:
    """Of each image, or of each of its tiles, the cells that the CLS of block -2 likes most."""
    _, attentions = tower_states(model, tiles_of(inputs))
    kept = []
    scores = split_tiles(attentions[-2].mean(dim=1)[:, 0, 1:], inputs)
    for size, image in zip(sizes_of(inputs), scores, strict=True):
        best: list[Cell] = []
        for view in views(size, budget):
            ranked = sorted(view, key=lambda cell: -float(image[cell]))  # noqa: B023
            best += ranked[:num_keep]
        kept.append(best)
    return kept


def shorten_next(
    model: Any,
    inputs: Inputs,
    kept: Sequence[Sequence[Cell]],
    separators: str = "rows",
    side: Side = "left",
    projected: Sequence[Tensor] | None = None,
) -> Short:
    """Drop all tokens but `kept` (of each image) from the prompt, and newlines as they say."""
    if not any(map(len, kept)):
        projected = []
    elif projected is None:
        projected = projected_tiles(model, inputs)
    sizes = sizes_of(inputs)
    images = iter(zip(sizes, projected, map(set, kept), strict=True))
    embed = model.model.language_model.embed_tokens
    rows, columns = [], []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        vectors, numbers, column = [], [], 0
        while column < len(ids):
            if ids[column] == IMAGE_TOKEN:
                size, tokens, keep = next(images)
                for cell in _read(size, keep, separators):
                    if cell is not None:
                        is_end = cell == (-1, -1)
                        vectors.append(model.model.image_newline if is_end else tokens[cell])
                        numbers.append(column)
                    column += 1
                continue
            if mask[column]:
                vectors.append(embed(ids[column]))
                numbers.append(column)
            column += 1
        rows.append(torch.stack(vectors))
        columns.append(torch.tensor(numbers))
    length = max(map(len, rows))
    padded = torch.stack([_pad(row, length, side, 0.0) for row in rows])
    kept_columns = torch.stack([_pad(c, length, side, -1) for c in columns])
    return Short(padded, (kept_columns >= 0).long(), kept_columns, model)


def _read(size: tuple[int, int], keep: set[Cell], separators: str) -> Iterator[Cell | None]:
    """For every placeholder of an image: the cell, (-1, -1) a newline, None what is dropped."""
    for token in range(NUM_TOKENS):
        yield (0, token) if (0, token) in keep else None
    for line in lines(size):
        for cell in line:
            yield cell if cell in keep else None
        used = any(cell in keep for cell in line)
        stays = separators == "all" or (separators == "rows" and used)
        yield (-1, -1) if stays else None
