from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.merging import merged
from ocvtp.ops.selection import fill_up, mask_of
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Selection, VisualTokens


@register("pool")
@dataclass(kw_only=True, eq=False)
class Pool(Pruner):
    """Pool: average the grid in cells, as if the image had been smaller; a control.

    Paper: none.

    Cells are those of adaptive average pooling to h x w. Where K has no such factors, some rows of
    cells have one cell more than others.

    Args:
        num_keep: tokens kept per image.
    Deviations: none. A cell centred on padding gives its place to a token of its own.
    """

    title: ClassVar[str] = (
        "Pool: average the grid in cells, as if the image had been smaller; a control."
    )
    reads: ClassVar[str] = "-"
    status: ClassVar[Status] = "control"
    merging: ClassVar[bool] = True

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        inside, centres = _cells(self._grid(tokens), num_keep, tokens.features.device)
        batch = tokens.batch_size
        inside, centres = inside.repeat(batch, 1, 1), centres.repeat(batch, 1)
        if tokens.valid is not None:
            inside, centres = _without_padding(inside, centres, tokens.valid)
        merge = inside.float()
        merge = merge / merge.sum(dim=2, keepdim=True).clamp(min=1)
        return merged(torch.nn.functional.pad(merge, (1, 0)), centres)


def _cells(grid_hw: tuple[int, int], num: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tokens are in each cell [1, K, N], and the cells' central tokens [1, K], ascending."""
    height, width = grid_hw
    rows = max(round((num * height / width) ** 0.5), -(-num // width))
    rows = min(rows, height, num)
    ends = torch.arange(1, rows + 1, device=device) * num // rows  # cells up to each row's end
    cell = torch.arange(num, device=device)
    row = torch.bucketize(cell, ends, right=True)
    start = torch.nn.functional.pad(ends, (1, 0))[row]
    columns, column = ends[row] - start, cell - start
    vertical = _spans(row, rows * torch.ones_like(row), height)
    horizontal = _spans(column, columns, width)
    inside = (vertical[:, :, None] & horizontal[:, None]).flatten(1)
    centre = (2 * row + 1) * height // (2 * rows) * width
    centre = centre + (2 * column + 1) * width // (2 * columns)
    return inside[None], centre[None]


def _spans(index: Tensor, parts: Tensor, length: int) -> Tensor:
    """[K, length]: floor(i length / parts) to ceil((i + 1) length / parts)."""
    place = torch.arange(length, device=index.device)
    start, stop = index * length // parts, -(-(index + 1) * length // parts)
    return (place >= start[:, None]) & (place < stop[:, None])


def _without_padding(inside: Tensor, centres: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The same over real tokens; tokens that take the place of a cell stay as they are."""
    num_keep, num_tokens = inside.shape[1:]
    chosen = mask_of(centres, num_tokens)
    raster = -torch.arange(num_tokens, device=valid.device).expand_as(valid)
    places = fill_up(chosen & valid, raster, num_keep, valid).keep_indices  # [B, K]
    own = places[:, :, None] == torch.arange(num_tokens, device=valid.device)
    same = places[:, :, None] == centres[:, None]  # [B, K, cells]
    cells = (same.float() @ inside.float()) > 0
    is_cell = same.any(dim=2, keepdim=True)
    return torch.where(is_cell, cells & valid[:, None], own), places
