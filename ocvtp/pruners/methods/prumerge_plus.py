from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.selection import descending, ranks, spaced
from ocvtp.pruners.base import NamedSettings, Status
from ocvtp.pruners.methods.prumerge import PruMerge
from ocvtp.pruners.registry import register


@register("prumerge_plus")
@dataclass(kw_only=True, eq=False)
class PruMergePlus(PruMerge):
    """PruMerge+: PruMerge with further tokens at equal steps over the image.

    Paper: https://arxiv.org/abs/2403.15388, section 3.4.

    Args:
        num_keep: tokens kept per image: a quarter of them by attention, the others at equal steps
            among the rest, and the last one, which sums up what is not kept.
        adaptive: keep the outliers of the attention and every s-th token, s a third of N over their
            number, as the paper does. So it does without a budget, also as `setting="paper"`; with
            one, at most so many.
        quality: share of the CLS's attention to the image, at full width, that the tokens kept by
            it must get, in place of the outliers; every s-th token comes on top.
        num_neighbours: paper: 32.
        block: whose queries and keys are read, at full width (no heads); paper: the last one.
    Deviations: an exact budget and `quality` are ours; the quarter is what the adaptive rule comes
        to. A step below 1 counts as 1, where the official code fails. Where that code keeps all N
        tokens and the sum of no others besides, N + 1 rows (577 of 576), there are N here, as many
        as places: the last one of its order is what is summed up.
    """

    title: ClassVar[str] = "PruMerge+: PruMerge with further tokens at equal steps over the image."
    reads: ClassVar[str] = "keys (with CLS)"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2403.15388"
    named_settings: ClassVar[NamedSettings] = {"paper": {}}

    def _counted(
        self, attention: Tensor, valid: Tensor | None, num_kept: Tensor, most: int
    ) -> tuple[Tensor, Tensor, int]:
        real = torch.ones_like(attention, dtype=torch.bool) if valid is None else valid
        count = real.sum(dim=1, keepdim=True)
        step = (count // num_kept // 3).clamp(min=1)  # [B, 1]
        place = real.cumsum(dim=1) - 1  # [B, N], among the real tokens
        rank = ranks(descending(attention, valid))
        top = rank < num_kept
        spatial = real & ~top & (place % step == 0) & (place < count - 1)
        num_kept = num_kept + spatial.sum(dim=1, keepdim=True)
        return _order(rank, top, spatial), num_kept.clamp(max=most - 1), most

    def _exact(self, attention: Tensor, valid: Tensor | None, num_keep: int) -> Tensor:
        rank = ranks(descending(attention, valid))
        num_top = round((num_keep - 1) / 4)
        top = rank < num_top
        rest = ~top if valid is None else ~top & valid
        indices, counts = spaced(rest, num_keep - 1 - num_top)
        spatial = torch.zeros_like(rest).scatter(1, indices, counts)
        return _order(rank, top, spatial)


def _order(rank: Tensor, top: Tensor, spatial: Tensor) -> Tensor:
    """Token numbers: the top ones by rank, the spatial ones in raster order, the others by rank."""
    num_tokens = rank.shape[1]
    raster = torch.arange(num_tokens, device=rank.device)
    late = torch.where(spatial, num_tokens + raster, 2 * num_tokens + rank)
    return torch.where(top, rank, late).argsort(dim=1)
