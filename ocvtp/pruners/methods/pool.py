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

    Cells are those of adaptive average pooling to h x w, of the part of the grid that the image
    fills. Where K has no such factors, some rows of cells have one cell more than others.

    Args:
        num_keep: tokens kept per image.
    Deviations: none. A cell centred on padding, as an image whose last row is not whole may have,
        gives its place to a token of its own.
    """

    title: ClassVar[str] = (
        "Pool: average the grid in cells, as if the image had been smaller; a control."
    )
    reads: ClassVar[str] = "-"
    status: ClassVar[Status] = "control"
    merging: ClassVar[bool] = True

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        inside, centres = _cells(*self._filled(tokens), self._grid(tokens), num_keep)
        if tokens.valid is not None:
            inside, centres = _without_padding(inside, centres, tokens.valid)
        merge = inside.float()
        merge = merge / merge.sum(dim=2, keepdim=True).clamp(min=1)
        return merged(torch.nn.functional.pad(merge, (1, 0)), centres)


def _cells(
    first: tuple[Tensor, Tensor], size: tuple[Tensor, Tensor], grid_hw: tuple[int, int], num: int
) -> tuple[Tensor, Tensor]:
    """Which tokens are in each cell [B, K, N], and the cells' central tokens [B, K], ascending.

    Args:
        first: row and column [B, 1] where the images begin. size: their rows and columns [B, 1].
        grid_hw: H and W. num: K.
    """
    (top, left), (height, width) = first, size
    rows = (num * height.double() / width).sqrt().round().long()
    rows = rows.maximum(-(-num // width)).minimum(height).clamp(max=num)
    cell = torch.arange(num, device=rows.device)  # the first r num // rows are in the first r rows
    row = ((cell + 1) * rows - 1) // num
    start, end = row * num // rows, (row + 1) * num // rows
    columns, column = end - start, cell - start
    vertical = _spans(top, row, rows, height, grid_hw[0])
    horizontal = _spans(left, column, columns, width, grid_hw[1])
    inside = (vertical[:, :, :, None] & horizontal[:, :, None]).flatten(2)
    centre = (top + (2 * row + 1) * height // (2 * rows)) * grid_hw[1]
    centre = centre + left + (2 * column + 1) * width // (2 * columns)
    return inside, centre


def _spans(first: Tensor, index: Tensor, parts: Tensor, length: Tensor, total: int) -> Tensor:
    """[B, K, total]: from floor(i length / parts) to ceil((i + 1) length / parts) after the first.

    Args:
        first: [B, 1]. index: i [B, K]. parts: [B, 1] or [B, K]. length: [B, 1].
        total: of the grid's rows or columns.
    """
    place = torch.arange(total, device=index.device)
    start = first + index * length // parts
    stop = first - (-(index + 1) * length // parts)
    return (place >= start[:, :, None]) & (place < stop[:, :, None])


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
