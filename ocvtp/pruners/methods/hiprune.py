from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.selection import descending, fill_up, mask_of
from ocvtp.pruners.base import NamedSettings, Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("hiprune")
@dataclass(kw_only=True, eq=False)
class HiPrune(Pruner):
    """HiPrune: keep anchors of a middle layer, their neighbours, and the registers of a deep one.

    Paper: https://arxiv.org/abs/2508.00553, section 3.

    Anchors receive the most attention in the object block. They and the tokens beside, above and
    below them are kept; the rest of the budget goes to what the deep block attends to.

    Args:
        num_keep: tokens kept per image; paper: 192, 128 or 64 of 576, also as
            `setting="paper-192"` etc.
        alpha: share of the budget for anchors with their four neighbours; paper: 0.1.
        object_block: a middle block; paper: 8 of 24 (the ninth).
        deep_block: paper: 22 of 24, LLaVA's selected one.
    Deviations: none. As in the official code, the neighbour of a token at the edge may lie across
        it, at the other end of the next row.
    """

    alpha: float = 0.1
    object_block: int = 8
    deep_block: int = -2

    title: ClassVar[str] = (
        "HiPrune: keep anchors of a middle layer, their neighbours, and the registers of a deep"
        " one."
    )
    reads: ClassVar[str] = "attention (received, two blocks)"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2508.00553"
    named_settings: ClassVar[NamedSettings] = {
        f"paper-{n}": {"num_keep": n, "alpha": 0.1} for n in (192, 128, 64)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}; pass a share of the budget, 0 to 1.")

    @property
    def needs(self) -> Needs:
        return Needs(attention=((self.object_block, "received"), (self.deep_block, "received")))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        deep = tokens.attention[self.deep_block, "received"]
        chosen = torch.zeros_like(deep, dtype=torch.bool)
        if num_anchors := round(num_keep * self.alpha / 5):
            middle = descending(tokens.attention[self.object_block, "received"], tokens.valid)
            chosen = _with_neighbours(middle[:, :num_anchors], tokens, self._grid(tokens)[1])
        return fill_up(chosen, deep, num_keep, tokens.valid)


def _with_neighbours(anchors: Tensor, tokens: VisualTokens, width: int) -> Tensor:
    """[B, n] -> [B, N] bool."""
    num_tokens = tokens.num_tokens
    last = torch.full_like(anchors[:, :1], num_tokens - 1)  # [B, 1]
    if tokens.valid is not None:
        place = torch.arange(num_tokens, device=anchors.device)
        last = (place * tokens.valid).amax(dim=1, keepdim=True)
    around = torch.cat([anchors + step for step in (0, -1, 1, -width, width)], dim=1)
    around = around.clamp(min=0).minimum(last)
    return mask_of(around, num_tokens)
