from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ocvtp.ops.diversity import spread, total
from ocvtp.ops.prompt_text import mean_squared_distance
from ocvtp.ops.selection import ascending, descending, ranks
from ocvtp.ops.similarity import Cosines, pairs_pay
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("trimtokenator")
@dataclass(kw_only=True, eq=False)
class TrimTokenator(Pruner):
    """TrimTokenator: leave out what is far from the prompt, then keep the least similar tokens.

    Paper: https://arxiv.org/abs/2509.00320, section 3.

    The first pick has the least mean cosine to all that stayed, each further one to those picked.

    Args:
        num_keep: tokens kept per image.
        first_ratio: share of the tokens that stay by their mean squared distance to the prompt's
            embeddings; paper: 0.8. The budget is chosen among them.
    Deviations: unofficial, there is no public code.
    """

    first_ratio: float = 0.8

    title: ClassVar[str] = (
        "TrimTokenator: leave out what is far from the prompt, then keep the least similar tokens."
    )
    reads: ClassVar[str] = "projected, text"
    status: ClassVar[Status] = "unofficial"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2509.00320"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first_ratio <= 1:
            raise ValueError(f"first_ratio={self.first_ratio}; pass a share of tokens, 0 to 1.")

    @property
    def needs(self) -> Needs:
        return Needs(projected=True, text=True)

    def _takes_turns(self, num_tokens: int, num_keep: int) -> bool:
        return not pairs_pay(num_tokens, num_keep)

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        assert tokens.projected is not None
        close = descending(-mean_squared_distance(tokens), tokens.valid)
        candidates = ranks(close) < self._stay(tokens, num_keep)
        cosines = Cosines(tokens.projected, num_keep)
        alike = cosines.to_sum(candidates).masked_fill(~candidates, float("inf"))
        picks = spread(cosines, alike.argmin(dim=1), num_keep, candidates, total)
        return ascending(picks, tokens.valid, tokens.num_tokens)

    def _stay(self, tokens: VisualTokens, num_keep: int) -> Tensor | int:
        """How many tokens of an image are candidates: a number, or [B, 1] where images differ."""
        if tokens.valid is None:
            return max(num_keep, int(self.first_ratio * tokens.num_tokens))
        count = tokens.valid.sum(dim=1, keepdim=True)
        return (self.first_ratio * count).long().clamp(min=num_keep).minimum(count)
