"""Columns of a prompt: where they stand after shortening, and the positions that they get.

B rows of the batch, L tokens of the caller's prompt, L' of the short one, C coordinates of a token.
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
)


def layout(keep: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Which old column stands at each new one, and which new ones are padding: [B, L'] each.

    Args:
        keep: [B, L] bool, what stays.
        real: [B, L] bool, False on padding.
    """
    batch, length = keep.shape
    if keep.equal(real):  # nothing dropped: leave the caller's padding as it is
        index = torch.arange(length, device=keep.device).expand(batch, -1)
        return index, ~real
    counts = keep.sum(dim=1)
    short = int(counts.max())
    pads_right = bool((real[:, 0] & ~real[:, -1]).any())
    # A stable sort moves kept columns to one side and keeps their order.
    order = keep.int().argsort(dim=1, descending=pads_right, stable=True)
    index = order[:, :short] if pads_right else order[:, length - short :]
    return index, ~keep.gather(1, index)


def gather(inputs: dict[str, Any], index: Tensor, padding: Tensor, pad_id: int) -> dict[str, Any]:
    """Everything that has a column for each token, shortened; the rest as it is."""
    short = {k: v for k, v in inputs.items() if k not in _PER_TOKEN}
    fill = {"input_ids": pad_id, "labels": -100}
    for name in _PER_TOKEN:
        if (value := inputs.get(name)) is not None:
            value = value.to(index.device).expand(*value.shape[:-2], *inputs["input_ids"].shape)
            short[name] = _gather_columns(value, index, padding, fill.get(name, 0))
    # Without a 2-D mask, transformers takes gaps in position_ids for packed sequences.
    if "position_ids" in short or bool(padding.any()):
        short.setdefault("attention_mask", (~padding).long())
    return short


def _gather_columns(values: Tensor, index: Tensor, padding: Tensor, fill: int) -> Tensor:
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
        [1 + C, B, L'], plain numbers of the columns before the coordinates: of these transformers
        makes masks. And [B, 1], how far the coordinates of what comes next, as the whole prompt has
        it, run ahead of those numbers.
    """
    following = coordinates.masked_fill(~real, -1).amax(dim=(0, 2))[:, None] + 1
    columns = ((~padding).long().cumsum(dim=1) - 1).clamp(min=0).masked_fill(padding, 0)
    kept = _gather_columns(coordinates, index, padding, 0)
    deltas = following - (~padding).sum(dim=1, keepdim=True)
    return torch.cat([columns[None], kept]), deltas


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
