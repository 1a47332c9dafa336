from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ocvtp.ops.diversity import spread
from ocvtp.ops.selection import ascending
from ocvtp.ops.similarity import Cosines, pairs_fit
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("divprune")
@dataclass(kw_only=True, eq=False)
class DivPrune(Pruner):
    """DivPrune: keep the K most mutually distant tokens (max-min diversity).

    Paper: https://arxiv.org/abs/2503.02175, Alg. 1.

    The first pick is the token farthest from its nearest neighbour under 1 - cosine; each further
    one is the farthest from all that are picked.

    Args:
        num_keep: tokens kept per image; paper: 56 of 576.
    Deviations: none.
    """

    title: ClassVar[str] = "DivPrune: keep the K most mutually distant tokens (max-min diversity)."
    reads: ClassVar[str] = "projected"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2503.02175"

    @property
    def needs(self) -> Needs:
        return Needs(projected=True)

    def _takes_turns(self, num_tokens: int, num_keep: int) -> bool:
        return not pairs_fit(num_tokens)

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        assert tokens.projected is not None
        # The first pick compares all pairs, whatever K is.
        cosines = Cosines(tokens.projected, num_rows=tokens.num_tokens)
        lonely = cosines.nearest_other(tokens.valid)
        if tokens.valid is not None:
            lonely = lonely.masked_fill(~tokens.valid, float("inf"))
        picks = spread(cosines, lonely.argmin(dim=1), num_keep, tokens.valid)
        return ascending(picks, tokens.valid, tokens.num_tokens)
