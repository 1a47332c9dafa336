"""Columns of a prompt: where they are after shortening, and the positions that they get.

L tokens of the caller's prompt, L' of the short one, C coordinates of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PER_TOKEN = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "labels",
    "token_type_ids",
    "mm_token_type_ids",
    "seq_idx",
)


def layout(keep: Tensor, real: Tensor, at_end: bool = True) -> tuple[Tensor, Tensor]:
    """Which old column each new one is, and which new ones are padding: [B, L'] each.

    Rows that lose fewer columns than others make the others shorter than L', so these are padded.

    Args:
        keep: [B, L] bool, what stays.
        real: [B, L] bool, False on padding.
        at_end: pad them on the left, so that what comes after all that is dropped keeps its
            place from the end, padding and holes included: answers begin where they did. Otherwise
            they are padded on the right, and begin where they did.
    """
    batch, length = keep.shape
    columns = torch.arange(length, device=keep.device)
    if keep.equal(real):  # nothing dropped: leave the caller's padding as it is
        return columns.expand(batch, -1), ~real
    if at_end:
        is_after = columns > columns.masked_fill(~(real & ~keep).any(dim=0), -1).max()
        stays = keep | (is_after & ~real)
    else:
        stays = keep | ~real.any(dim=0)  # padding that all rows have
    short = int(stays.sum(dim=1).max())
    # A stable sort moves what stays to one side and keeps its order.
    order = stays.int().argsort(dim=1, descending=not at_end, stable=True)
    index = order[:, length - short :] if at_end else order[:, :short]
    return index, ~keep.gather(1, index)


def pads_on_right(real: Tensor) -> bool:
    """Whether rows [B, L] are padded on the right only, as in batches to train on."""
    begins = bool((real[:, 1:] & ~real[:, :-1]).any())  # a token after padding
    return not begins and bool((real[:, 0] & ~real[:, -1]).any())


def has_holes(padding: Tensor) -> bool:
    """Whether padding [B, L'] is between the tokens of a row."""
    columns = torch.arange(padding.shape[1], device=padding.device).expand_as(padding)
    first = columns.masked_fill(padding, padding.shape[1]).amin(dim=1, keepdim=True)
    last = columns.masked_fill(padding, -1).amax(dim=1, keepdim=True)
    return bool((padding & (columns > first) & (columns < last)).any())


def numbered(padding: Tensor) -> Tensor:
    """[B, L'] the number of each token among those of its row, 0 on padding."""
    return ((~padding).long().cumsum(dim=1) - 1).clamp(min=0).masked_fill(padding, 0)


def gather(inputs: dict[str, Any], index: Tensor, padding: Tensor, pad_id: int) -> dict[str, Any]:
    """Everything that has a column for each token, shortened; the rest as it is."""
    short = {k: v for k, v in inputs.items() if k not in _PER_TOKEN}
    fill = {"input_ids": pad_id, "labels": -100}
    for name in _PER_TOKEN:
        if (value := inputs.get(name)) is not None:
            value = value.to(index.device).expand(*value.shape[:-2], *inputs["input_ids"].shape)
            short[name] = gather_columns(value, index, padding, fill.get(name, 0))
    return short


def gather_columns(values: Tensor, index: Tensor, padding: Tensor, fill: int = 0) -> Tensor:
    """[..., B, L] -> [..., B, L'], `fill` where `padding` [B, L'] is True."""
    index = index.expand(*values.shape[:-2], *index.shape)
    return values.gather(-1, index).masked_fill(padding, fill)


def gather_coordinates(
    coordinates: Tensor, real: Tensor, index: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """Position ids of a short prompt whose tokens keep the coordinates that they had.

    Args:
        coordinates: [C, B, L] of the whole prompt.
        real: [B, L] bool, False on padding.
        index: [B, L'] and padding: [B, L'], see `layout`.

    Returns:
        [1 + C, B, L'], plain numbers of the columns, from which transformers makes masks, and then
        the coordinates. And [B, 1], how far the coordinates of what comes next in the whole prompt
        run ahead of those numbers.
    """
    following = coordinates.masked_fill(~real, -1).amax(dim=(0, 2))[:, None] + 1
    kept = gather_columns(coordinates, index, padding)
    deltas = following - (~padding).sum(dim=1, keepdim=True)
    return torch.cat([numbered(padding)[None], kept]), deltas


def continue_positions(start: Tensor, deltas: Tensor | None, mask: Tensor, rest: Tensor) -> Tensor:
    """Position ids of a prompt and of what follows it.

    Args:
        start: [B, L'], or [1 + C, B, L'] with `deltas`, see `gather_coordinates`.
        deltas: [B, 1].
        mask: [B, L'] bool of the prompt.
        rest: [B, n] mask of what follows.
    """
    steps = rest.long().cumsum(dim=1)
    if deltas is None:
        return torch.cat([start, start.amax(dim=1, keepdim=True) + steps], dim=1)
    columns = mask.sum(dim=1, keepdim=True) - 1 + steps  # [B, n]
    coordinates = (columns + deltas).expand(len(start) - 1, -1, -1)
    return torch.cat([start, torch.cat([columns[None], coordinates])], dim=2)
