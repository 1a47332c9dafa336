from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.merging import kept_and_rest, merged
from ocvtp.ops.prompt_text import clip_parts
from ocvtp.ops.selection import count_for_share, count_outliers, descending, ranks
from ocvtp.ops.similarity import full
from ocvtp.pruners.base import AdaptivePruner, Budget, NamedSettings, QualityPruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("trim")
@dataclass(kw_only=True, eq=False)
class TRIM(QualityPruner, AdaptivePruner):
    """TRIM: keep the tokens that CLIP relates to the prompt, and the mean of all others.

    Paper: https://arxiv.org/abs/2409.10994, section 3.

    Args:
        num_keep: tokens kept per image, the mean of the others included.
        adaptive: keep the tokens whose score is an outlier, above Q3 + 1.5 (Q3 - Q1), as the paper
            does. So it does without a budget, also as `setting="paper"`; with one, at most so many
            are kept.
        quality: share of the softmax over the scores that the kept tokens must hold, in place of
            the outliers.
        nearest: prefer the tokens nearest to the prompt; the official code reverses the sign,
            because patches of OpenAI's CLIP lie opposite to the text that they show. Not all do.
    Deviations: `quality` is ours. As in the official code the dot products are not normalised, and
        of a long prompt the first 77 tokens are read.
    """

    nearest: bool = False

    title: ClassVar[str] = (
        "TRIM: keep the tokens that CLIP relates to the prompt, and the mean of all others."
    )
    reads: ClassVar[str] = "clip"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2409.10994"
    budgets: ClassVar[tuple[Budget, ...]] = ("exact", "adaptive", "quality")
    named_settings: ClassVar[NamedSettings] = {"paper": {}}
    merging: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(clip=True)

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        related = _nearness(tokens) if self.nearest else -_nearness(tokens)
        num_tokens, valid = tokens.num_tokens, tokens.valid
        order = descending(related, valid)
        num_rows = num_keep
        if not self.exact:
            scores = related if valid is None else related.masked_fill(~valid, float("-inf"))
            shares = scores.softmax(dim=1)
            if self.quality is None:
                num_rows = min(num_keep, num_tokens // 4 + 2)
                num_kept = count_outliers(shares, valid).clamp(max=num_rows - 1)
            else:
                num_kept = count_for_share(shares, self.quality, valid).clamp(max=num_rows - 1)
                num_kept = num_kept.minimum(tokens.real.sum(dim=1, keepdim=True) - 1)
        else:
            num_kept = torch.full_like(order[:, :1], num_keep - 1)
        # Rows: the kept tokens in raster order, then the rest, of which the best lends its place.
        rank = ranks(order)
        raster = torch.arange(num_tokens, device=rank.device)
        order = torch.where(rank < num_kept, raster, num_tokens + rank).argsort(dim=1)
        rest = (rank >= num_kept) if valid is None else (rank >= num_kept) & valid
        share = 1 / rest.sum(dim=1, keepdim=True).clamp(min=1)
        merge = kept_and_rest(order, num_kept, rest * share, num_rows)
        counts = torch.arange(num_rows, device=rank.device) <= num_kept
        return merged(merge, order[:, :num_rows], None if self.exact else counts)


def _nearness(tokens: VisualTokens) -> Tensor:
    """[B, N] the dot product with the first part of the prompt."""
    assert tokens.clip_visual is not None
    text = clip_parts(tokens)[:, 0]
    return (full(tokens.clip_visual) @ full(text)[:, :, None]).squeeze(2)
