"""ToDRE.

B images, N visual tokens, K kept, D' width of the projected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.diversity import cosine, spread
from ocvtp.pruners.registry import register
from ocvtp.pruners.selection import ascending, descending
from ocvtp.pruners.similarity import unit
from ocvtp.structures import Needs, Selection, VisualTokens


@register("todre")
@dataclass(kw_only=True, eq=False)
class ToDRE(Pruner):
    """ToDRE: start from the token the CLS attends to most, add the least similar ones in total.

    Paper: https://arxiv.org/abs/2505.18757, Alg. 1 (stage 1).
    Stage: llm_input.  Needs: attention (CLS), projected.  Deterministic: yes.

    Each further pick has the least sum of cosines to those picked before.

    Args:
        num_keep: tokens kept per image.
        block: block of the tower whose attention is read; paper: the last one.
    Deviations: unofficial, written from the paper's algorithm. Stage 2, which drops all visual
        tokens inside the language model, is not part of this pruner.
    """

    block: int = -1

    status: ClassVar[Status] = "unofficial"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2505.18757"

    @property
    def needs(self) -> Needs:
        """The CLS row of one block, and the tokens that the language model would read."""
        return Needs(attention=((self.block, "cls"),), projected=True)

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        assert tokens.projected is not None
        pivot = descending(tokens.attention[self.block, "cls"], tokens.valid)[:, 0]
        picks = spread(
            cosine(unit(tokens.projected)), pivot, num_keep, tokens.valid, accumulate=torch.add
        )
        return ascending(picks, tokens.valid, tokens.num_tokens)
