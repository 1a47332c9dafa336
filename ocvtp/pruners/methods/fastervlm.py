from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ocvtp.ops.selection import count_for_share, descending, keep_first, top_k
from ocvtp.pruners.base import QualityPruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("fastervlm")
@dataclass(kw_only=True, eq=False)
class FasterVLM(QualityPruner):
    """FasterVLM: keep the K tokens that the CLS token attends to most.

    Paper: https://arxiv.org/abs/2412.01818, section 3.

    Args:
        num_keep: tokens kept per image; paper: 288 to 29 of 576.
        quality: share of the CLS's attention to the image that the kept tokens must get.
        block: block of the tower whose attention is read; paper: 22 of 24, LLaVA's selected one.
    Deviations: `quality` is ours.
    """

    block: int = -2

    title: ClassVar[str] = "FasterVLM: keep the K tokens that the CLS token attends to most."
    reads: ClassVar[str] = "attention (CLS)"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2412.01818"

    @property
    def needs(self) -> Needs:
        return Needs(attention=((self.block, "cls"),))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        attention, valid = tokens.attention[self.block, "cls"], tokens.valid
        if self.quality is None:
            return top_k(attention, num_keep, valid)
        count = count_for_share(attention, self.quality, valid)
        return keep_first(
            descending(attention, valid)[:, :num_keep], count, valid, tokens.num_tokens
        )
