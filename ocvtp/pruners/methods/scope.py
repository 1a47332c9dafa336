from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ocvtp.ops.cover import CoverGains
from ocvtp.ops.selection import ascending, ceilings
from ocvtp.ops.similarity import cosine_pairs
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens, take


@register("scope")
@dataclass(kw_only=True, eq=False)
class SCOPE(Pruner):
    """SCOPE: keep the tokens that add the most coverage of all others, weighted by their saliency.

    Paper: https://arxiv.org/abs/2510.24214, section 3.

    A token adds sum_j max(0, cos_ij - c_j) times its CLS attention, where c_j is the cosine of
    token j to the nearest kept one.

    Args:
        num_keep: tokens kept per image.
        alpha: exponent of the attention; the official code's 1.
        block: block of the tower whose attention is read; LLaVA's selected one.
    Deviations: none.
    """

    alpha: float = 1.0
    block: int = -2

    title: ClassVar[str] = (
        "SCOPE: keep the tokens that add the most coverage of all others, weighted by their"
        " saliency."
    )
    reads: ClassVar[str] = "attention (CLS)"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2510.24214"

    @property
    def needs(self) -> Needs:
        return Needs(attention=((self.block, "cls"),))

    def _takes_turns(self, num_tokens: int, num_keep: int) -> bool:
        return True

    @torch.no_grad()
    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        cosine, _ = cosine_pairs(tokens.features)  # [B, N, N], needed by every step
        saliency = tokens.attention[self.block, "cls"] ** self.alpha
        most = ceilings(saliency, tokens.valid)
        if tokens.valid is not None:  # padding covers nothing and is kept last
            cosine = cosine * tokens.valid[:, None] * tokens.valid[:, :, None]
        covered = torch.zeros_like(saliency)
        gains, picks = CoverGains(cosine), []
        for _ in range(num_keep):
            gain = gains(covered) * saliency
            pick = torch.fmin(gain, most).argmax(dim=1, keepdim=True)  # [B, 1]
            picks.append(pick)
            most = most.scatter(1, pick, float("-inf"))
            covered = torch.maximum(covered, take(cosine, pick).squeeze(1))
        return ascending(torch.cat(picks, dim=1), tokens.valid, tokens.num_tokens)
