"""Qwen2.5-VL in transformers: the tower runs in the order of its windows.

Most blocks attend inside windows, some (`fullatt_block_indexes`) inside whole images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ocvtp.hosts.families.qwen_vl import QwenHost
from ocvtp.towers.windows import window_order


class Qwen25VLHost(QwenHost):
    """Qwen2.5-VL; see `QwenHost`.

    Attention sums to 1 over a segment, so patches of a small window at the edge have more of it:
    for methods that compare tokens of the whole image, choose a block of `fullatt_block_indexes`,
    e.g. -1.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    family: ClassVar[str] = "Qwen2.5-VL"

    def _places(self, grids: Sequence[tuple[int, int]]) -> Tensor:
        config = self.tower.config
        window = config.window_size // config.patch_size // config.spatial_merge_size
        return window_order(grids, window).argsort()
