"""Operations of vision towers and projectors.

T tokens of a block (with the CLS, where there is one), P patches of an image, R visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ocvtp.flops.formulas import attention, linear
from ocvtp.flops.sizes import ClipSizes, QwenSizes


@dataclass(frozen=True)
class BlockRows:
    """T of one block: of its `attention`, and of its `mlp`, which pruners that merge make fewer."""

    attention: int
    mlp: int

    @classmethod
    def equal(cls, rows: int) -> BlockRows:
        """A block that merges nothing."""
        return cls(rows, rows)


def clip_tower(sizes: ClipSizes, rows: Sequence[BlockRows], num_halves: int) -> int:
    """Operations of a CLIP or SigLIP tower on one view.

    Args:
        sizes: of the tower.
        rows: of each block.
        num_halves: how many halves of blocks run, the attention of a block and its MLP.
    """
    width = sizes.width
    total = linear(sizes.view_tokens, sizes.patch_inputs, width)
    for number, block in enumerate(rows):
        if 2 * number < num_halves:
            total += linear(block.attention, width, 4 * width)
            total += attention(block.attention, block.attention, width)
        if 2 * number + 1 < num_halves:
            total += linear(block.mlp, width, 2 * sizes.ffn)
    return total


def clip_projector(sizes: ClipSizes, out: int, num_rows: int) -> int:
    """Operations of LLaVA's projector on R rows, to the width `out`."""
    inputs = sizes.width * len(sizes.layers_read)
    return linear(num_rows, inputs, out) + linear(num_rows, out, out)


def qwen_tower(sizes: QwenSizes, grid_hw: tuple[int, int]) -> int:
    """Operations of Qwen2.5-VL's tower on one image.

    Args:
        sizes: of the tower.
        grid_hw: rows and columns of visual tokens.
    """
    patches = grid_hw[0] * grid_hw[1] * sizes.unit**2
    block = linear(patches, sizes.width, 4 * sizes.width + 3 * sizes.ffn)
    pairs = sum(
        length**2
        for number in range(sizes.blocks)
        for length in window_lengths(sizes, grid_hw, whole=number in sizes.whole)
    )
    embedding = linear(patches, sizes.patch_inputs, sizes.width)
    return embedding + sizes.blocks * block + attention(1, pairs, sizes.width)


def qwen_merger(sizes: QwenSizes, out: int, num_rows: int) -> int:
    """Operations of Qwen's merger on R rows, to the width `out`."""
    inputs = sizes.width * sizes.unit**2
    return linear(num_rows, inputs, inputs) + linear(num_rows, inputs, out)


def window_lengths(sizes: QwenSizes, grid_hw: tuple[int, int], whole: bool) -> list[int]:
    """Patches that attend to each other: of every window, or the `whole` image."""
    windows = [grid_hw[:1], grid_hw[1:]] if whole else [_parts(n, sizes.window) for n in grid_hw]
    return [height * width * sizes.unit**2 for height in windows[0] for width in windows[1]]


def _parts(length: int, window: int) -> list[int]:
    """A side cut into windows, the last of which may be smaller."""
    whole, rest = divmod(length, window)
    return [window] * whole + ([rest] if rest else [])
