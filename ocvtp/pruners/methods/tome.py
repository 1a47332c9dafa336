"""T are the tokens of a block with its CLS, L the blocks of the tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.bipartite import (
    MergeSpec,
    even_schedule,
    first_places,
    match,
    merge_down,
    parse_r,
)
from ocvtp.ops.merging import head_mean, merge_rows, merged
from ocvtp.pruners.base import Status
from ocvtp.pruners.block_merger import BlockMerger
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("tome")
@dataclass(kw_only=True, eq=False)
class ToMe(BlockMerger):
    """ToMe: merge the most similar tokens in every block of the vision tower.

    Paper: https://arxiv.org/abs/2210.09461, section 3.

    Between attention and MLP, tokens in even places are compared with those in odd places by their
    keys, and the most similar pairs are averaged by their sizes; later blocks attend to a mean of
    s tokens as to s (`log s` is added to its logits). The CLS is left alone. The language model
    reads merged tokens in raster order, each in the place of the first of its tokens. `select` on
    tokens outside of a tower merges them in one go, by the keys of one block.

    Args:
        num_keep: tokens kept per image (per tile, where there are tiles), exactly: blocks up to the
            layer that is read merge as equally many as can be. None if `r` is given.
        r: tokens that a block merges, as the official code writes it: one number; a list with one
            for each block; or `(r, inflect)`, e.g. `(8, -1.0)` for twice 8 in the first block down
            to none in the last.
        block: of whose keys `select` merges tokens outside of a tower.
    Deviations: an exact K, which the official code has no setting for. Equally similar pairs: the
        first is merged.
    """

    r: MergeSpec | None = None
    block: int = -1

    title: ClassVar[str] = "ToMe: merge the most similar tokens in every block of the vision tower."
    reads: ClassVar[str] = "keys"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2210.09461"

    def __post_init__(self) -> None:
        if self.r is None:
            self._check_budget()
        elif self.has_budget:
            raise ValueError(
                f"tome got r={self.r} and a budget; pass r, or one of num_keep, keep_ratio and"
                " max_keep."
            )
        else:
            self._first_r(self.r)  # refuses what says nothing

    @property
    def fixed_by(self) -> str | None:
        return None if self.r is None else f"was built with r={self.r!r}"

    @property
    def needs(self) -> Needs:
        return Needs(keys=(self.block,))

    def budget(self, num_tokens: int) -> int:
        """K; with `r`, what is left after one block."""
        if self.r is None:
            return super().budget(num_tokens)
        return num_tokens - min(self._first_r(self.r), num_tokens // 2)

    def schedule(self, num_tokens: int, num_blocks: int, num_read: int) -> tuple[int, ...]:
        if self.r is None:
            keep = self.budget(num_tokens)
            merged_away = even_schedule(num_tokens, keep, num_read)
            return (*merged_away, *[0] * (num_blocks - num_read))
        found, left = [], num_tokens
        for r in parse_r(self.r, num_blocks):
            found.append(min(r, left // 2))
            left -= found[-1]
        return tuple(found)

    def rows(self, keys: Tensor, num_heads: int, num_merged: int, has_cls: bool) -> Tensor:
        return match(head_mean(keys, num_heads), num_merged, has_cls)

    @staticmethod
    def _first_r(r: MergeSpec) -> int:
        return parse_r(r, len(r) if isinstance(r, Sequence) else 1)[0]

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        metric = head_mean(tokens.keys[self.block], tokens.num_heads)
        row_of, sizes = merge_down(metric, num_keep, tokens.valid)
        sizes = torch.nn.functional.pad(sizes, (0, 1), value=1.0)
        weights = sizes.clamp(min=1).reciprocal().gather(1, row_of)
        numbers = torch.arange(tokens.num_tokens, device=row_of.device).expand_as(row_of)
        anchors = first_places(numbers, row_of, num_keep + 1)[:, :num_keep]
        merge = merge_rows(row_of, weights, num_keep)
        return merged(merge, anchors).in_raster_order()
