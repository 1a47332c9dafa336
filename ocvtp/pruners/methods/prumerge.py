from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.merging import kept_and_rest, merged
from ocvtp.ops.selection import count_for_share, count_outliers, descending
from ocvtp.ops.similarity import full, unit
from ocvtp.pruners.base import AdaptivePruner, Budget, NamedSettings, QualityPruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens, take


@register("prumerge")
@dataclass(kw_only=True, eq=False)
class PruMerge(QualityPruner, AdaptivePruner):
    """PruMerge: keep the tokens the CLS attends to, add their neighbours to them, sum up the rest.

    Paper: https://arxiv.org/abs/2403.15388, section 3.

    Every kept token is added the sum of its nearest neighbours among all tokens, each weighted by
    its attention; one last token is such a sum of all that are not kept.

    Args:
        num_keep: tokens kept per image, the last one included.
        adaptive: keep the outliers of the attention, above Q3 + 1.5 (Q3 - Q1), as the paper does.
            So it does without a budget, also as `setting="paper"`; with one, at most so many are
            kept.
        quality: share of the CLS's attention to the image, at full width, that the tokens kept by
            it must get, in place of the outliers.
        num_neighbours: paper: 32.
        block: whose queries and keys are read, at full width (no heads); paper: the last one.
    Deviations: an image without an outlier keeps one token; the official code fails. `quality` is
        ours.
    """

    num_neighbours: int = 32
    block: int = -1

    title: ClassVar[str] = (
        "PruMerge: keep the tokens the CLS attends to, add their neighbours to them, sum up the"
        " rest."
    )
    reads: ClassVar[str] = "keys (with CLS)"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2403.15388"
    budgets: ClassVar[tuple[Budget, ...]] = ("exact", "adaptive", "quality")
    named_settings: ClassVar[NamedSettings] = {"paper": {}}
    merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_neighbours < 1:
            raise ValueError(f"num_neighbours={self.num_neighbours}; pass at least 1.")

    @property
    def needs(self) -> Needs:
        return Needs(keys=(self.block,), cls_queries=(self.block,))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        attention = self._attention(tokens)
        if not self.exact:
            if self.quality is None:
                num_kept = count_outliers(attention, tokens.valid).clamp(min=1)
            else:
                num_kept = count_for_share(attention, self.quality, tokens.valid)
            order, num_kept, num_rows = self._counted(attention, tokens.valid, num_kept, num_keep)
            num_kept = num_kept.minimum(tokens.real.sum(dim=1, keepdim=True) - 1)  # and the last
        else:
            order, num_rows = self._exact(attention, tokens.valid, num_keep), num_keep
            num_kept = torch.full_like(order[:, :1], num_keep - 1)
        merge = kept_and_rest(order, num_kept, attention, num_rows)
        near = self._neighbours(tokens, order[:, : num_rows - 1])  # [B, rows - 1, N]
        kept = torch.arange(num_rows - 1, device=order.device) < num_kept
        merge[:, :-1, 1:] += near * kept[:, :, None] * attention[:, None]
        counts = torch.arange(num_rows, device=order.device) <= num_kept
        return merged(merge, order[:, :num_rows], None if self.exact else counts)

    def _attention(self, tokens: VisualTokens) -> Tensor:
        """[B, N] the CLS row at full width, 0 on padding."""
        query, keys = tokens.cls_queries[self.block], tokens.keys[self.block]
        keys = torch.cat([tokens.cls_keys[self.block][:, None], keys], dim=1)
        logits = (full(keys) @ full(query)[:, :, None]).squeeze(2) * keys.shape[2] ** -0.5
        if tokens.valid is not None:
            logits[:, 1:] = logits[:, 1:].masked_fill(~tokens.valid, float("-inf"))
        attention: Tensor = logits.softmax(dim=1)
        return attention[:, 1:]

    def _counted(
        self, attention: Tensor, valid: Tensor | None, num_kept: Tensor, most: int
    ) -> tuple[Tensor, Tensor, int]:
        """Token numbers, kept first; how many are kept [B, 1]; rows for the most that may be."""
        num_rows = min(most, attention.shape[1] // 4 + 2) if self.quality is None else most
        return descending(attention, valid), num_kept.clamp(max=num_rows - 1), num_rows

    def _exact(self, attention: Tensor, valid: Tensor | None, num_keep: int) -> Tensor:
        """Token numbers, the K - 1 kept ones first."""
        return descending(attention, valid)

    def _neighbours(self, tokens: VisualTokens, kept: Tensor) -> Tensor:
        """[B, k] -> [B, k, N], 1 where a token is among the nearest of a kept one."""
        keys = unit(tokens.keys[self.block])
        cosine = take(keys, kept) @ keys.transpose(1, 2)
        if tokens.valid is not None:
            cosine = cosine.masked_fill(~tokens.valid[:, None], -2.0)
        cosine = cosine.scatter(2, kept[:, :, None], float("-inf"))  # not itself
        nearest = cosine.topk(min(self.num_neighbours, keys.shape[1] - 1), dim=2).indices
        return torch.zeros_like(cosine).scatter(2, nearest, 1.0)
