"""Packed patches of Qwen's vision towers, in window order; some blocks see a single window.

R units of all images, P patches, 4 of them a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ocvtp.structures import AttentionKey, AttentionKind, Needs
from ocvtp.towers import taps
from ocvtp.transformers_names import rotate_patches


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


@dataclass(frozen=True)
class PackedBlock:
    """What the attention of a block compares.

    Args:
        queries: [P, D], all heads side by side, before positions turn them.
        keys: [P, D].
        turns: cosines and sines [P, D / H] of the patches' positions.
        ends: where segments begin and end: 0 first, P last.
    """

    queries: Tensor
    keys: Tensor
    turns: tuple[Tensor, Tensor]
    ends: Tensor


def gather(
    blocks: Mapping[int, PackedBlock],
    hidden: Mapping[int, Tensor],
    view: taps.Tower,
    needs: Needs,
    units: Units,
) -> dict[str, Any]:
    """What `needs` names of a tower: means over units, in raster order.

    Args:
        blocks: number -> what was recorded of it, in the order of windows.
        hidden: layer -> [P, D].
        view: of the tower.
        needs: of the pruner.
        units: of the images.

    Returns:
        Keyword arguments of `VisualTokens`.

    Raises:
        RuntimeError: for what was not recorded.
    """
    layers = {number: view.layer(number) for number in needs.hidden}
    numbers = {number: view.block(number) for number in needs.blocks}
    missing = {f"layer {n}" for n in layers.values() if n not in hidden}
    missing |= {f"block {n}" for n in numbers.values() if n not in blocks}
    if missing:
        raise RuntimeError(
            f"the vision tower ran but the hooks on {sorted(missing)} did not fire: attach the"
            " pruner before the tower is compiled or exported."
        )
    attention: dict[AttentionKey, Tensor] = {}
    for number, kind in needs.attention:
        by_patch = _attention(blocks[numbers[number]], view.num_heads, kind)
        attention[number, kind] = units.raster(by_patch)
    return {
        "hidden": {number: units.raster(hidden[layer]) for number, layer in layers.items()},
        "attention": attention,
        "keys": {number: units.raster(blocks[numbers[number]].keys) for number in needs.keys},
    }


def _attention(block: PackedBlock, num_heads: int, kind: AttentionKind) -> Tensor:
    """[P] of the patches, in the order in which the tower runs them."""
    split = (num_heads, block.queries.shape[1] // num_heads)
    queries, keys = block.queries.unflatten(1, split), block.keys.unflatten(1, split)
    queries, keys = rotate_patches(queries, keys, *block.turns)
    ends = block.ends.tolist()
    return segment_means(queries.flatten(1), keys.flatten(1), num_heads, kind, ends)


def window_sizes(grid_hw: tuple[int, int], window: int) -> list[int]:
    """Units of the windows of an image, in their order; those at the edge may be smaller.

    Args:
        grid_hw: rows and columns of the image.
        window: units along the side of a window.
    """
    rows, columns = (_parts(length, window) for length in grid_hw)
    return [height * width for height in rows for width in columns]


def _parts(length: int, window: int) -> list[int]:
    """A side cut into windows."""
    whole, rest = divmod(length, window)
    return [window] * whole + ([rest] if rest else [])


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
