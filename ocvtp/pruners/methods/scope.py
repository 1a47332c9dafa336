from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.selection import ascending, ceilings
from ocvtp.ops.similarity import cosine_pairs
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens, take

_VALUES_AT_ONCE = 200_000  # 0.8 MB, as much as two blocks of an image with 576 tokens


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
        blocks = cosine.split(_rows_at_once(cosine), dim=1)
        room = torch.empty_like(blocks[0])  # used again and again: fresh memory costs more
        picks = []
        for _ in range(num_keep):
            added = [
                torch.sub(block, covered[:, None], out=room[:, : block.shape[1]]).clamp_(min=0)
                .sum(dim=2)
                for block in blocks
            ]  # fmt: skip
            gain = torch.cat(added, dim=1) * saliency
            pick = torch.fmin(gain, most).argmax(dim=1, keepdim=True)  # [B, 1]
            picks.append(pick)
            most = most.scatter(1, pick, float("-inf"))
            covered = torch.maximum(covered, take(cosine, pick).squeeze(1))
        return ascending(torch.cat(picks, dim=1), tokens.valid, tokens.num_tokens)


def _rows_at_once(matrix: Tensor) -> int:
    """On a CPU so many of [B, N, N] that what is made of them stays in a core's cache."""
    count = matrix.shape[1]
    if matrix.device.type != "cpu" or torch.compiler.is_compiling():
        return count
    return math.ceil(count / math.ceil(matrix.numel() / _VALUES_AT_ONCE))
