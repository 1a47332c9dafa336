"""Pruners that merge tokens in the blocks of the vision tower.

T are the tokens of a block: the CLS first, where there is one, then the N of the patches.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ocvtp.pruners.base import Pruner
from ocvtp.structures import Needs, Stage


@dataclass(kw_only=True, eq=False)
class BlockMerger(Pruner):
    """A pruner of stage `encoder` that merges tokens between attention and MLP, block by block.

    The host averages the tokens of each row, and lets later blocks attend to a mean of s
    tokens as to s tokens. A row stands in the place of the first of its tokens.
    """

    stage: ClassVar[Stage] = "encoder"
    merging: ClassVar[bool] = True

    @property
    def tower_needs(self) -> Needs:
        return Needs()

    @abstractmethod
    def schedule(self, num_tokens: int, num_blocks: int, num_read: int) -> tuple[int, ...]:
        """How many tokens each block merges.

        Args:
            num_tokens: N.
            num_blocks: L of the tower.
            num_read: how many of them run before the layer that the projector reads.

        Returns:
            L numbers, each at most half of the tokens that are left there.

        Raises:
            ValueError: if the budget cannot be met.
        """

    @abstractmethod
    def rows(self, keys: Tensor, num_heads: int, num_merged: int, has_cls: bool) -> Tensor:
        """[B, T] the row, of T - `num_merged`, that every token goes to.

        Args:
            keys: [B, T, D] of the block, all heads side by side.
            num_heads: of them.
            num_merged: see `schedule`.
            has_cls: whether the first token is a CLS (or the last of a tower's registers); it stays
                alone, and first.
        """
