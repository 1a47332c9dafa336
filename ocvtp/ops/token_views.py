"""Tokens of a call as other views than the tower had.

T views of the tower (images, or tiles of images), N tokens of each, U views that pruners see, M
tokens of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def left_over(there: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens that are there, in raster order.

    Args:
        there: [T, N] bool.

    Returns:
        [T, M] their numbers, M the most that a view has; and which of them count, [T, M] bool, the
        first ones of each view; None where all do.
    """
    counts = there.sum(dim=1)
    index = there.sort(dim=1, descending=True, stable=True).indices[:, : int(counts.max())]
    valid = there.gather(1, index)
    return index, None if bool(valid.all()) else valid


def counted(index: Tensor, num_tokens: int) -> Tensor:
    """[T, M] numbers of tokens of their own view, counted over all T N."""
    return index + num_tokens * torch.arange(len(index), device=index.device)[:, None]


def numbers_of_rows(places: Tensor, num_rows: int) -> Tensor:
    """[R] which token of its view is each of the rows that are read, -1 where none is.

    Args:
        places: [U, M] the row of every token, -1 on padding.
        num_rows: R.
    """
    numbers = torch.full((num_rows + 1,), -1, device=places.device)
    tokens = torch.arange(places.shape[1], device=places.device).expand_as(places)
    # Padding has row -1, i.e. the last one, which is none.
    return numbers.scatter(0, (places % len(numbers)).flatten(), tokens.flatten())[:-1]


def seen_of_tiles(found: dict[str, Any], index: Tensor, tiles: Tensor) -> dict[str, Any]:
    """Arguments of `VisualTokens` for views, from those for tiles.

    Args:
        found: for T tiles.
        index: [U, M] numbers of tokens.
        tiles: [U] whose CLS is taken.
    """

    def of_tokens(values: Tensor) -> Tensor:  # [T, N, ...] -> [U, M, ...]
        return values.flatten(0, 1)[index]

    def of_tile(values: Tensor) -> Tensor:  # [T, ...] -> [U, ...]
        return values[tiles]

    per_tile = {"cls": of_tile, "cls_keys": of_tile, "cls_queries": of_tile}
    seen: dict[str, Any] = {}
    for name, value in found.items():
        pick = per_tile.get(name, of_tokens)
        if isinstance(value, Tensor):
            value = pick(value)
        elif isinstance(value, dict):
            value = {key: pick(tensor) for key, tensor in value.items()}
        seen[name] = value
    return seen
