"""Looking inside Qwen-VL's vision tower of vLLM, without hooks.

P patches of all images of a call, R units of them, which are the visual tokens; I images.

vLLM may call its blocks past any hook, so the tower's own forward runs over blocks that note what
they are given; queries and keys are computed again from that, with the block's own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ocvtp.serving.layouts import QwenLayout
from ocvtp.structures import Needs
from ocvtp.towers import taps
from ocvtp.towers.windows import PackedBlock, gather

Heads = Callable[[Tensor], Tensor]


def look(
    tower: Any,
    pixel_values: Tensor,
    grids_thw: list[list[int]],
    needs: Needs,
    layout: QwenLayout,
    whole_heads: Heads,
) -> tuple[Tensor, dict[str, Any]]:
    """Run a tower of vLLM and gather what a pruner reads inside of it.

    Args:
        tower: vLLM's.
        pixel_values: [P, ...].
        grids_thw: of each image the frames (1), and the rows and columns of its patches.
        needs: of the pruner.
        layout: of the model.
        whole_heads: [P, D / ranks] of this rank's heads -> [P, D] of all heads.

    Returns:
        [R, ...] what the tower gives, image after image, with further layers (DeepStack) side by
        side; and arguments of `VisualTokens` of I images, padded to the largest.
    """
    view = taps.Tower([*tower.blocks], int(tower.num_heads), _no_hooks)
    numbers = {view.block(number) for number in needs.blocks}
    layers = {view.layer(number) for number in needs.hidden}
    run = _Run(tower, layers | numbers)
    rows: Tensor = type(tower).forward(run, pixel_values, grids_thw)
    grids = [layout.grid(grid) for grid in grids_thw]
    blocks = {n: run.compared(n, layout.ends(n, grids), whole_heads) for n in numbers}
    return rows, gather(blocks, run.hidden, view, needs, layout.units(grids))


class _Run:
    """One run of a tower, which stands for it in its own forward: the same but for the blocks.

    Args:
        tower: that runs.
        layers: numbers of `hidden_states` to note.
    """

    def __init__(self, tower: Any, layers: set[int]) -> None:
        self._tower, self._layers = tower, layers
        self.hidden: dict[int, Tensor] = {}
        """Layer -> [P, D]."""
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}
        self.blocks = [partial(self._block, n, block) for n, block in enumerate(tower.blocks)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tower, name)

    def compared(self, number: int, ends: Tensor, whole_heads: Heads) -> PackedBlock:
        """What the attention of a block compares.

        Args:
            number: of the block. ends: of its segments. whole_heads: see `look`.
        """
        block = self._tower.blocks[number]
        fused, _ = block.attn.qkv(block.norm1(self.hidden[number][:, None]))
        queries, keys, _ = (whole_heads(part[:, 0]) for part in fused.chunk(3, dim=-1))
        return PackedBlock(queries, keys, self._turns[number], ends)

    def _block(self, number: int, block: Any, states: Tensor, **how: Any) -> Tensor:
        self._note(number, states)
        if number in self._layers:
            half = how["rotary_pos_emb_cos"], how["rotary_pos_emb_sin"]
            cos, sin = (torch.cat([part, part], dim=-1) for part in half)
            self._turns[number] = cos, sin
        given: Tensor = block(states, **how)
        if number + 1 == len(self.blocks):
            self._note(number + 1, given)
        return given

    def _note(self, number: int, states: Tensor) -> None:
        if number in self._layers:
            self.hidden[number] = states[:, 0].clone()  # blocks write over what they are given


def batches(sizes: Sequence[int], most: int) -> list[range]:
    """The numbers of consecutive images of `most` tokens together, or single ones that have more.

    Args:
        sizes: tokens of each image.
        most: that one run of the tower is given.
    """
    found: list[range] = []
    total = 0
    for number, size in enumerate(sizes):
        if found and total + size <= most:
            found[-1] = range(found[-1].start, number + 1)
            total += size
        else:
            found.append(range(number, number + 1))
            total = size
    return found


def _no_hooks(block: Any) -> tuple[nn.Module, nn.Module]:
    raise AssertionError("the tower of a server is not hooked")
