"""LLaVA-OneVision's prompts pruned by hand: which means of which tokens are read where.

I images of a batch, N = 16 tokens of a tile, R rows that are read of an image, D' their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from reference import IMG, Inputs, Short, Side, _pad
from reference_next import Cell, lines, tile_grid
from tiny_models import BOS, IMAGE_TOKEN, PAD
from tiny_onevision import PINPOINTS
from torch import Tensor

Mean = dict[Cell, float]
"""Shares of tokens of tiles; of one token where nothing is resized. Empty: a newline."""
NUM_TOKENS = 16
EXACT = [(50, 100), (90, 140), (33, 33), (100, 112)]
RESIZED = [(150, 200), (210, 190), (224, 224)]
EITHER = [(150, 200), (33, 33), (100, 112)]
ONE = [(5, IMG, 4)]
SEVERAL = [(5, IMG, 3, IMG, IMG, 4)]
SINGLES = [(5, IMG, 4), (9,), (3, IMG, 6)]
BATCH = [(5, IMG, 4), (9,), (3, IMG, 2, IMG, 6)]
Image = tuple[tuple[int, int], bool]
"""Size, and whether it is the only one of its prompt."""


def read(image: Image) -> list[tuple[int, Mean]]:
    """Every row that is read of an image: its line (-1 in a base view), and what it is."""
    size, alone = image
    base = [{(0, token): 1.0} for token in range(NUM_TOKENS)]
    if not alone:
        return [(0, mean) for mean in [*base, {}]]
    grid: list[list[Mean]] = [[{cell: 1.0} for cell in line] for line in lines(size, PINPOINTS)]
    ratio = math.sqrt(sum(map(len, grid)) / (9 * NUM_TOKENS))
    if ratio > 1.1:
        grid = _resize(grid, int(len(grid) // ratio), int(len(grid[0]) // ratio))
    fine = [(number, mean) for number, line in enumerate(grid) for mean in [*line, {}]]
    return [(-1, mean) for mean in base] + fine


def _resize(grid: list[list[Mean]], height: int, width: int) -> list[list[Mean]]:
    """Bilinearly, pixel centres at halves."""
    rows, columns = _shares(len(grid), height), _shares(len(grid[0]), width)
    found = []
    for row in rows:
        line = []
        for column in columns:
            mean: Mean = {}
            for y, of_y in row:
                for x, of_x in column:
                    for cell, share in grid[y][x].items():
                        mean[cell] = mean.get(cell, 0.0) + of_y * of_x * share
            line.append(mean)
        found.append(line)
    return found


def _shares(length: int, short: int) -> list[list[tuple[int, float]]]:
    found = []
    for i in range(short):
        place = max(0.0, (i + 0.5) * length / short - 0.5)
        first = int(place)
        second = min(first + 1, length - 1)
        found.append([(first, 1 - place + first), (second, place - first)])
    return found


def is_resized(image: Image) -> bool:
    return any(len(mean) > 1 for _, mean in read(image))


def num_tiles(image: Image) -> int:
    rows, columns = tile_grid(image[0], PINPOINTS)
    return 1 + rows * columns if image[1] else 1


def make_onevision(
    rows: Sequence[tuple[int | str, ...]],
    side: Side = "left",
    sizes: Sequence[tuple[int, int]] = EXACT,
) -> Inputs:
    """What a processor returns; images have these sizes in turn."""
    random = torch.Generator().manual_seed(0)
    prompts, used, counts = [], list[Image](), []
    for row in rows:
        ids = [BOS]
        counts.append(row.count(IMG))
        for part in row:
            if part == IMG:
                used.append((sizes[len(used) % len(sizes)], counts[-1] == 1))
                ids += [IMAGE_TOKEN] * len(read(used[-1]))
            else:
                ids += torch.randint(3, 99, (int(part),), generator=random).tolist()
        prompts.append(ids)
    length = max(map(len, prompts))
    ids = [_pad(torch.tensor(p), length, side, PAD) for p in prompts]
    masks = [_pad(torch.ones(len(p)).long(), length, side, 0) for p in prompts]
    inputs = {"input_ids": torch.stack(ids), "attention_mask": torch.stack(masks)}
    if used:
        most = max(map(num_tiles, used))
        pixels = torch.full((len(used), most, 3, 56, 56), 99.0)  # padding that would be noticed
        for number, image in enumerate(used):
            real = torch.randn(num_tiles(image), 3, 56, 56, generator=random)
            pixels[number, : len(real)] = real
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor([s for s, _ in used])}
        inputs["batch_num_images"] = torch.tensor(counts)
    return inputs


def images_of(inputs: Inputs) -> list[Image]:
    alone = [count == 1 for count in inputs["batch_num_images"].tolist() for _ in range(count)]
    sizes = [(height, width) for height, width in inputs["image_sizes"].tolist()]
    return list(zip(sizes, alone, strict=True))


def arguments(inputs: Inputs) -> dict[str, Any]:
    """Those of the images."""
    return {k: inputs[k] for k in ("pixel_values", "image_sizes", "batch_num_images")}


def single_onevision(inputs: Inputs, row: int) -> Inputs:
    """One row of a batch, without its padding columns and tiles."""
    real = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    first, count = (int(inputs["batch_num_images"][part].sum()) for part in (slice(row), row))
    if count:
        images = slice(first, first + count)
        most = max(map(num_tiles, images_of(inputs)[images]))
        alone["pixel_values"] = inputs["pixel_values"][images, :most]
        alone["image_sizes"] = inputs["image_sizes"][images]
        alone["batch_num_images"] = inputs["batch_num_images"][row : row + 1]
    return alone


def tiles_of(inputs: Inputs) -> Tensor:
    """[T, 3, 56, 56] without the padding tiles."""
    pairs = zip(inputs["pixel_values"], images_of(inputs), strict=True)
    return torch.cat([pixels[: num_tiles(image)] for pixels, image in pairs])


def split_tiles(values: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """[T, ...] by image."""
    return values.split([num_tiles(image) for image in images_of(inputs)])


def tower_features(model: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """[tiles, N, D] of each image."""
    states = model.model.vision_tower(tiles_of(inputs), output_hidden_states=True).hidden_states
    return split_tiles(states[-1], inputs)


@torch.no_grad()
def rows_of(model: Any, inputs: Inputs) -> list[Tensor]:
    """[R, D'] of each image, newlines included."""
    found = []
    for tiles, image in zip(tower_features(model, inputs), images_of(inputs), strict=True):
        tokens, rows = model.model.multi_modal_projector(tiles), []
        for _, mean in read(image):
            parts = [share * tokens[cell] for cell, share in mean.items()]
            rows.append(torch.stack(parts).sum(dim=0) if parts else model.model.image_newline)
        found.append(torch.stack(rows))
    return found


def views(image: Image, budget: str = "per_image") -> list[list[int]]:
    """Numbers of the rows that a pruner sees as one image, in its order."""
    tokens = [(number, mean) for number, (_, mean) in enumerate(read(image)) if mean]
    if budget == "per_image":
        return [[number for number, _ in tokens]]
    assert not is_resized(image)
    cells = [(*min(mean), number) for number, mean in tokens]
    tiles = (sorted(c for c in cells if c[0] == tile) for tile in range(num_tiles(image)))
    return [[number for _, _, number in tile] for tile in tiles if tile]


def best_rows(
    model: Any,
    inputs: Inputs,
    num_keep: int,
    budget: str = "per_image",
    score: Callable[[Tensor], Tensor] = lambda rows: rows.sum(dim=-1),
) -> list[list[int]]:
    """Of each image, or of each of its tiles, the rows with the highest scores."""
    kept = []
    for image, rows in zip(images_of(inputs), rows_of(model, inputs), strict=True):
        scores = score(rows)
        best: list[int] = []
        for view in views(image, budget):
            best += sorted(view, key=lambda number: -float(scores[number]))[:num_keep]  # noqa: B023
        kept.append(best)
    return kept


@torch.no_grad()
def shorten_onevision(
    model: Any,
    inputs: Inputs,
    kept: Sequence[Sequence[int]],
    separators: str = "rows",
    side: Side = "left",
    rows_read: Sequence[Tensor] | None = None,
) -> Short:
    """Drop all image rows but `kept` (of each image) and newlines as they say."""
    rows_read = rows_of(model, inputs) if rows_read is None else rows_read
    images = iter(zip(images_of(inputs), rows_read, map(set, kept), strict=True))
    embed = model.model.language_model.embed_tokens
    rows, columns = [], []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        vectors, numbers, column = [], [], 0
        while column < len(ids):
            if ids[column] == IMAGE_TOKEN:
                image, values, keep = next(images)
                lines_used = {line for k, (line, _) in enumerate(read(image)) if k in keep}
                for number, (line, mean) in enumerate(read(image)):
                    stays = separators == "all" or (separators == "rows" and line in lines_used)
                    if number in keep if mean else stays:
                        vectors.append(values[number])
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
