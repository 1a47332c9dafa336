from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ocvtp.ops.selection import top_k
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("fastervlm")
@dataclass(kw_only=True, eq=False)
class FasterVLM(Pruner):
    """FasterVLM: keep the K tokens that the CLS token attends to most.

    Paper: https://arxiv.org/abs/2412.01818, section 3.

    Args:
        num_keep: tokens kept per image; paper: 288 to 29 of 576.
        block: block of the tower whose attention is read; paper: 22 of 24, LLaVA's selected one.
    Deviations: none.
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
        return top_k(tokens.attention[self.block, "cls"], num_keep, tokens.valid)
