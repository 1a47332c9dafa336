from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.selection import descending, fill_up, ranks
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("holov")
@dataclass(kw_only=True, eq=False)
class HoloV(Pruner):
    """HoloV: share the budget among crops by their attention, keep the best tokens of each.

    Paper: https://arxiv.org/abs/2510.02912, section 3.

    Crops are runs of tokens in raster order; where they cannot be equal, the first N % C have one
    token more. Each gets a share of the budget by its mean attention, rounded down; what is left
    goes to the crops of the largest shares, one token each.

    Args:
        num_keep: tokens kept per image.
        num_crops: runs that an image is cut into; paper: 16.
        block: block of the tower whose attention is read; LLaVA's selected one.
    Deviations: unofficial in form: written to reproduce selections of the official code, which CLS
        attention alone explains. Where a crop is given more tokens than it has, the official code
        pads with zero vectors; here the best tokens of all other crops fill up. Of a crop of one
        token among larger ones (N below 2 C) the official code takes the score a thousand times
        too small; here all are on one scale.
    """

    num_crops: int = 16
    block: int = -2

    title: ClassVar[str] = (
        "HoloV: share the budget among crops by their attention, keep the best tokens of each."
    )
    reads: ClassVar[str] = "attention (CLS)"
    status: ClassVar[Status] = "unofficial"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2510.02912"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_crops < 1:
            raise ValueError(f"num_crops={self.num_crops}; pass at least 1.")

    @property
    def needs(self) -> Needs:
        return Needs(attention=((self.block, "cls"),))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        attention = tokens.attention[self.block, "cls"]
        if tokens.valid is not None:
            attention = attention * tokens.valid
        crop = self._crops(attention, tokens.valid)  # [B, N]
        sizes = self._of_crops(tokens.real.to(attention), crop)
        means = self._of_crops(attention, crop) / sizes.clamp(min=1)
        shares = means / means.sum(dim=1, keepdim=True).clamp(min=1e-30)
        quota = (shares * num_keep).floor()
        left = num_keep - quota.sum(dim=1, keepdim=True)
        quota = quota + (ranks(descending(shares, None)) < left)  # [B, C]
        # Rank within the crop: order by attention, then stably by crop.
        best = descending(attention, tokens.valid)
        order = best.gather(1, crop.gather(1, best).sort(dim=1, stable=True).indices)
        members = self._of_crops(torch.ones_like(attention), crop)  # padding among the last one's
        first = (members.cumsum(dim=1) - members).gather(1, crop)
        chosen = ranks(order) - first < quota.gather(1, crop)
        return fill_up(chosen, attention, num_keep, tokens.valid)

    def _of_crops(self, values: Tensor, crop: Tensor) -> Tensor:
        """[B, C] sums of [B, N] over the tokens of each crop."""
        sums = torch.zeros_like(values[:, :1]).repeat(1, self.num_crops)
        return sums.scatter_add(1, crop, values)

    def _crops(self, attention: Tensor, valid: Tensor | None) -> Tensor:
        """[B, N] the crop of every token: runs of the image's real tokens, longer ones first."""
        if valid is None:
            place = torch.arange(attention.shape[1], device=attention.device).expand_as(attention)
            count = torch.full_like(place[:, :1], attention.shape[1])
        else:
            place = (valid.cumsum(dim=1) - 1).clamp(min=0)
            count = valid.sum(dim=1, keepdim=True)
        size, num_longer = count // self.num_crops, count % self.num_crops
        in_longer = num_longer * (size + 1)  # tokens
        shorter = num_longer + (place - in_longer) // size.clamp(min=1)
        return torch.where(place < in_longer, place // (size + 1), shorter)
