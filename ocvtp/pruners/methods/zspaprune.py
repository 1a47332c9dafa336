from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ocvtp.ops.diversity import spread_from
from ocvtp.ops.prompt_text import text_mean
from ocvtp.ops.selection import ascending, descending
from ocvtp.ops.similarity import Cosines, pairs_pay, unit
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("zspaprune")
@dataclass(kw_only=True, eq=False)
class ZSPAPrune(Pruner):
    """ZSPAPrune: keep a core of tokens close to the prompt, and the most diverse of the others.

    Paper: https://arxiv.org/abs/2510.17197, section 3.

    Args:
        num_keep: tokens kept per image.
        core_ratio: share of them chosen by cosine to the mean of the prompt's embeddings; the rest
            is filled up by max-min diversity; paper: 0.6.
    Deviations: unofficial, there is no public code.
    """

    core_ratio: float = 0.6

    title: ClassVar[str] = (
        "ZSPAPrune: keep a core of tokens close to the prompt, and the most diverse of the others."
    )
    reads: ClassVar[str] = "projected, text"
    status: ClassVar[Status] = "unofficial"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2510.17197"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.core_ratio <= 1:
            raise ValueError(f"core_ratio={self.core_ratio}; pass a share of the budget, 0 to 1.")

    @property
    def needs(self) -> Needs:
        return Needs(projected=True, text=True)

    def _core(self, num_keep: int) -> int:
        return max(1, int(num_keep * self.core_ratio))

    def _takes_turns(self, num_tokens: int, num_keep: int) -> bool:
        return not pairs_pay(num_tokens, num_keep - self._core(num_keep))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        assert tokens.projected is not None
        num_core = self._core(num_keep)
        num_rest = num_keep - num_core
        cosines = Cosines(tokens.projected, num_rest)
        core = descending(cosines.to(unit(text_mean(tokens))), tokens.valid)[:, :num_core]
        rest = spread_from(cosines, cosines.nearest_of(core), core, num_rest, tokens.valid)
        picks = torch.cat([core, rest], dim=1)
        return ascending(picks, tokens.valid, tokens.num_tokens)
