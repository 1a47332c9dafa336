"""What nobody reads of a vision tower and its projector does not run while a pruner encodes.

A block is two halves, its attention and its MLP: half 2b is the attention of block b, 2b + 1 its
MLP. From the first half on that nobody reads, the tower's modules return what they are given, by a
`forward` of the instance; no class is touched. Outside of `taps.recording()`, and inside compiled
code, they run as always.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ocvtp.hosts.wrap_methods import Original, Wrapped
from ocvtp.structures import Needs
from ocvtp.towers import taps
from ocvtp.towers.hooks import Hook
from ocvtp.towers.recordings import CALL


def first_unread(tower: taps.Tower, layers: Sequence[int], readers: Sequence[Needs]) -> int:
    """The first half of a block that nobody reads.

    Args:
        tower: with B blocks.
        layers: of `hidden_states` that go to the projector. Models differ in whether the last one
            is taken before the tower's norm or after it: the norm, half 2 B, is then read.
        readers: what else is read: other layers, and the queries and keys of blocks, which their
            attention makes.

    Returns:
        0 to 2 B + 1.

    Raises:
        ValueError: if the tower has no such layer or block.
    """
    count = len(tower.blocks)
    asked = [layer for needs in readers for layer in needs.hidden]
    numbers = [tower.layer(layer) for layer in [*layers, *asked]]
    blocks = [tower.block(block) for needs in readers for block in needs.blocks]
    halves = [2 * layer + (layer == count) for layer in numbers]
    return max([*halves, *(2 * block + 1 for block in blocks)], default=0)


def hooks(blocks: Sequence[Any], after: Sequence[nn.Module], asked: Collection[int]) -> list[Hook]:
    """Let blocks be left out, or the `mlp` of one, and what follows them.

    Args:
        blocks: of the tower.
        after: its norm, and what reads that.
        asked: numbers of blocks whose attention may be the last thing that is read.
    """
    modules = [module for block in blocks for module in (block, block.mlp)]
    return [
        Hook(module, partial(Wrapped, forward, module, partial(_hand_on, half)))
        for half, module in enumerate([*modules, *after])
        if half % 2 == 0 or half // 2 in asked or half > 2 * len(blocks)
    ]


def hooks_of_projector(projector: nn.Module) -> list[Hook]:
    """Let the projector be left out."""
    return [Hook(projector, partial(Wrapped, forward, projector, _zeros))]


def forward(
    module: Any,
    original: Original,
    instead: Callable[[taps.Recording, Tensor], Tensor | None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`module.forward`, or `instead` if nobody reads what it would make."""
    call = None if torch.compiler.is_compiling() else CALL.get()
    if call is not None and (record := call.recording) is not None:
        given = args[0] if args else next(iter(kwargs.values()))
        if (output := instead(record, given)) is not None:
            return output
    return original(*args, **kwargs)


def _hand_on(half: int, record: taps.Recording, given: Tensor) -> Tensor | None:
    if record.first_unread is None or half < record.first_unread:
        return None
    record.is_cut = True
    return given


def _zeros(record: taps.Recording, features: Tensor) -> Tensor | None:
    if (width := record.projected_width) is None:
        return None
    record.is_projected_later = True
    return features.new_zeros(()).expand(*features.shape[:-1], width)
