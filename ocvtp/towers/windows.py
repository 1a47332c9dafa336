"""Packed patches of Qwen's vision towers, in window order; some blocks see a single window.

R units of all images, P patches, 4 of them a unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ocvtp.structures import AttentionKind
from ocvtp.towers import taps


class Units:
    """From packed patches in the order of windows to padded images of units in raster order.

    Args:
        size: patches of a unit.
        counts: units of each image.
        places: [R] where in the order of windows each unit is.
    """

    def __init__(self, size: int, counts: Sequence[int], places: Tensor) -> None:
        self._size, self._counts, self._places = size, counts, places

    def raster(self, patches: Tensor) -> Tensor:
        """[P, ...] -> [I, N, ...], means over units."""
        means = patches.unflatten(0, (-1, self._size)).mean(dim=1)  # [R, ...]
        return self.split(means[self._places.to(means.device)])

    def split(self, rows: Tensor) -> Tensor:
        """[R, ...] -> [I, N, ...], 0 after the units of a smaller image."""
        return pad_sequence(rows.split(list(self._counts)), batch_first=True)


def window_order(grids: Sequence[tuple[int, int]], window: int) -> Tensor:
    """[R] units, numbered in raster order image after image, in the order of windows.

    Args:
        grids: rows and columns of each image.
        window: units along the side of a window.
    """
    order, first = [], 0
    for height, width in grids:
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        window_of = rows // window * -(-width // window) + columns // window  # [H, W]
        order.append(first + window_of.flatten().argsort(stable=True))
        first += height * width
    return torch.cat(order)


def segment_means(
    queries: Tensor, keys: Tensor, num_heads: int, kind: AttentionKind, ends: Sequence[int]
) -> Tensor:
    """`taps.attention_mean` inside segments of a packed sequence.

    Args:
        queries: [P, D], all heads side by side.
        keys: [P, D].
        num_heads: of both.
        kind: `received` or `given`.
        ends: where segments begin and end: 0 first, P last.

    Returns:
        [P] in fp32.
    """
    means = queries.new_zeros(len(queries), dtype=torch.float32)
    starts = torch.tensor(ends[:-1])
    lengths = torch.tensor(ends).diff()
    for length in lengths.unique().tolist():  # segments of a length together
        patches = starts[lengths == length][:, None] + torch.arange(length)  # [S, length]
        patches = patches.to(queries.device)
        means[patches] = taps.attention_mean(queries[patches], keys[patches], num_heads, kind, 0)
    return means
