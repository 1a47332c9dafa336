"""VisionDrop, its stage before the language model.

B images, N visual tokens, K kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.merging import contextual_share, dominant_and_contextual, head_mean
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("visiondrop")
@dataclass(kw_only=True, eq=False)
class VisionDrop(Pruner):
    """VisionDrop: keep the tokens that all others attend to, and merge the rest into a few.

    Paper: https://arxiv.org/abs/2506.22283, section 3, the stage before the language model.
    Stage: llm_input.  Needs: attention (received), keys.  Deterministic: yes.

    Args:
        num_keep: tokens kept per image by this stage; paper: 48 of 576 (42 + 6) where later stages
            bring the average over layers down to 32.
        num_contextual: merged tokens among them; None for the paper's share of 6 / 48.
        block: block of the tower that is read; paper: 22 of 24, LLaVA's selected one.
    Deviations: the paper's further stages inside the language model are not part of this pruner.
    """

    num_contextual: int | None = None
    block: int = -2

    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2506.22283"
    merging: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        """One block's attention and keys."""
        return Needs(attention=((self.block, "received"),), keys=(self.block,))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        contextual = contextual_share(self.num_contextual, 6 / 48, num_keep, num_keep)
        return dominant_and_contextual(
            tokens.attention[self.block, "received"],
            head_mean(tokens.keys[self.block], tokens.num_heads),
            num_dominant=num_keep - contextual,
            num_contextual=contextual,
            with_cls=False,
            valid=tokens.valid,
        )
