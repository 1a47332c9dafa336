"""Which tokens of a vision tower are still there.

T tokens of the tower (the CLS included, where there is one), R rows that run, N patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows that run in place of all tokens, from some block on.

    Args:
        places: [B, R] the token in whose place each row is; `num_tokens` on padding.
        num_tokens: T.
        real: [B, R] bool, False on padding, which is last; None where all rows count.
        sizes: [B, R] fp32, of how many tokens each row is the mean; None where all are 1.
    """

    places: Tensor
    num_tokens: int
    real: Tensor | None = None
    sizes: Tensor | None = None

    @staticmethod
    def all(batch: int, num_tokens: int, device: torch.device) -> Rows:
        """Every token in its place."""
        return Rows(torch.arange(num_tokens, device=device).expand(batch, -1), num_tokens)

    def keep(self, indices: Tensor, valid: Tensor | None, num_prefix: int) -> Rows:
        """The prefix tokens and some of the patches.

        Args:
            indices: [B, K] of rows, prefix left out.
            valid: [B, K] bool, those that count; None for all.
            num_prefix: tokens before the patches.
        """
        prefix = torch.arange(num_prefix, device=indices.device).expand(len(indices), -1)
        index = torch.cat([prefix, indices + num_prefix], dim=1)
        places = self.places.gather(1, index)
        sizes = None if self.sizes is None else self.sizes.gather(1, index)
        if valid is None:
            return replace(self, places=places, sizes=sizes)
        real = torch.cat([torch.ones_like(prefix, dtype=torch.bool), valid], dim=1)
        return Rows(places.masked_fill(~real, self.num_tokens), self.num_tokens, real, sizes)

    def bias(self) -> Tensor | None:
        """[B, R] fp32, to be added to the attention logits of each row as a key.

        A mean of s tokens is attended to as s tokens are (ToMe's proportional attention), padding
        not at all. None where there is nothing to add.
        """
        if self.real is None and self.sizes is None:
            return None
        sizes = torch.ones_like(self.places, dtype=torch.float32)
        bias = (sizes if self.sizes is None else self.sizes).log()
        return bias if self.real is None else bias.masked_fill(~self.real, float("-inf"))

    def gather(self, values: Tensor) -> Tensor:
        """[B, T, D] of all tokens -> [B, R, D]; padding repeats the last token."""
        index = self.places.clamp(max=self.num_tokens - 1)
        return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))

    def gather_patches(self, table: Tensor, num_prefix: int) -> Tensor:
        """[N, d] of the patches of every image -> [B, 1, R - `num_prefix`, d] for all heads."""
        places = self.places[:, num_prefix:].clamp(max=self.num_tokens - 1) - num_prefix
        return table[places][:, None]

    def scatter(self, values: Tensor) -> Tensor:
        """[B, R, D] -> [B, T, D], 0 in the places of tokens that are not there."""
        spare = 0 if self.real is None else 1
        shape = (len(values), self.num_tokens + spare, values.shape[2])
        index = self.places[:, :, None].expand_as(values)
        return values.new_zeros(shape).scatter(1, index, values)[:, : self.num_tokens]

    def ran(self) -> Tensor:
        """[B, T] bool, which tokens have a row."""
        shape = (len(self.places), self.num_tokens + 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.places.device)
        return mask.scatter(1, self.places, True)[:, : self.num_tokens]


@dataclass
class Step:
    """What a block does.

    Args:
        rows: that it is given; None while all tokens run.
        num_merged: rows that it merges away.
        row_of: [U, R] the row that each of them goes to; None before they are matched, or if it
            merges none.
        merged: the rows after that.
        keys: [U, R, D] of the block, until they are matched.
        mixed: [U, R - num_merged, D] what was merged, until the MLP has run.
    """

    rows: Rows | None
    num_merged: int = 0
    row_of: Tensor | None = None
    merged: Rows | None = None
    keys: Tensor | None = None
    mixed: Tensor | None = None

    @property
    def left(self) -> Rows | None:
        """The rows that are left after it."""
        return self.rows if self.merged is None else self.merged


class TowerRun:
    """One forward of a tower that prunes. No dataclass: wrappers unpack arguments that are one.

    Args:
        num_read: blocks that run before the last layer that is read.
    """

    def __init__(self, num_read: int) -> None:
        self.num_read = num_read
        self.grid_hw = (0, 0)
        """Of the patches."""
        self.rows: Rows | None = None
        """That run; None while all tokens do."""
        self.merges: tuple[int, ...] = ()
        """How many rows each block merges away; none where none does."""
        self.steps: dict[int, Step] = {}
        """Of the blocks that ran."""
        self.started = False
        """Whether the tower got its pixels."""
