from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.diversity import Kernel
from ocvtp.ops.prompt_text import last_text
from ocvtp.ops.selection import ascending, descending, ranks
from ocvtp.ops.similarity import Cosines, pairs_pay, unit
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("greedyprune")
@dataclass(kw_only=True, eq=False)
class GreedyPrune(Pruner):
    """GreedyPrune: keep the most salient tokens, leaving out what resembles one that is kept.

    Paper: https://arxiv.org/abs/2506.13166, section 3.

    Saliency is the cosine to the last token of the prompt. If too little is left, tokens that were
    left out fill up, the most salient first.

    Args:
        num_keep: tokens kept per image.
        tau: cosine above which a token counts as a repetition.
    Deviations: unofficial, there is no public code, and little is certain about its form.
    """

    tau: float = 0.9

    title: ClassVar[str] = (
        "GreedyPrune: keep the most salient tokens, leaving out what resembles one that is kept."
    )
    reads: ClassVar[str] = "projected, text"
    status: ClassVar[Status] = "unofficial"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2506.13166"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau}; pass a cosine, -1 to 1.")

    @property
    def needs(self) -> Needs:
        return Needs(projected=True, text=True)

    def _takes_turns(self, num_tokens: int, num_keep: int) -> bool:
        return not pairs_pay(num_tokens, num_keep)

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        assert tokens.projected is not None
        cosines = Cosines(tokens.projected, num_keep)
        saliency = cosines.to(unit(last_text(tokens)))
        rank = ranks(descending(saliency, tokens.valid))
        if tokens.valid is not None:  # after all repetitions too
            rank = rank + 2 * tokens.num_tokens * ~tokens.valid
        picks = self._suppress(rank, cosines, num_keep)
        return ascending(picks, tokens.valid, tokens.num_tokens)

    def _suppress(self, rank: Tensor, kernel: Kernel, num_keep: int) -> Tensor:
        """[B, K] by rank [B, N], repetitions of what is kept N ranks later."""
        num_tokens = rank.shape[1]
        repeats = torch.zeros_like(rank, dtype=torch.bool)
        taken = torch.zeros_like(repeats)
        picks = []
        for _ in range(num_keep):
            pick = (rank + num_tokens * repeats + 4 * num_tokens * taken).argmin(dim=1)
            picks.append(pick)
            repeats = repeats | (kernel(pick) > self.tau)
            taken = taken.scatter(1, pick[:, None], True)
        return torch.stack(picks, dim=1)
