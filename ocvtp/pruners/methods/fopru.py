from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ocvtp.ops.selection import ascending, descending, ranks, top_k
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("fopru")
@dataclass(kw_only=True, eq=False)
class FoPru(Pruner):
    """FoPru: keep the tokens of the highest visual focus, single ones or whole rows of the grid.

    Paper: https://arxiv.org/abs/2411.14164, Alg. 1.

    A token's significance is the attention that it gives or that it receives among the patches,
    whichever varies more over the image.

    Args:
        num_keep: tokens kept per image; paper: 144 to 432 of 576.
        strategy: `rank` keeps the most significant tokens; `row` keeps the rows of the grid with
            the highest sum, and fills up with the best tokens of the next one.
        block: block of the tower whose attention is read; paper: 22 of 24, LLaVA's selected one.
    Deviations: unofficial, there is no public code. The paper's `row` keeps whole rows only; ours
        adds a part of one where `num_keep` is no multiple of the width.
    """

    strategy: Literal["rank", "row"] = "rank"
    block: int = -2

    title: ClassVar[str] = (
        "FoPru: keep the tokens of the highest visual focus, single ones or whole rows of the grid."
    )
    reads: ClassVar[str] = "attention (given, received)"
    status: ClassVar[Status] = "unofficial"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2411.14164"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in ("rank", "row"):
            raise ValueError(f"strategy={self.strategy!r}; pass 'rank' or 'row'.")

    @property
    def needs(self) -> Needs:
        means = ((self.block, "given"), (self.block, "received"))
        return Needs(attention=means, patch_queries=True)  # type: ignore[arg-type]

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        significance = self._significance(tokens)
        if self.strategy == "rank":
            return top_k(significance, num_keep, tokens.valid)
        return self._whole_rows(significance, tokens, num_keep)

    def _significance(self, tokens: VisualTokens) -> Tensor:
        given = tokens.attention[self.block, "given"]
        received = tokens.attention[self.block, "received"]
        varies = _variance(given, tokens.valid) > _variance(received, tokens.valid)
        return torch.where(varies, given, received)

    def _whole_rows(self, significance: Tensor, tokens: VisualTokens, num_keep: int) -> Selection:
        height, width = self._grid(tokens)
        real = significance if tokens.valid is None else significance * tokens.valid
        sums = real.unflatten(1, (height, width)).sum(dim=2)  # [B, H]
        row_rank = ranks(descending(sums, None)).repeat_interleave(width, dim=1)  # [B, N]
        best = descending(significance, tokens.valid)
        if tokens.valid is not None:
            row_rank = row_rank.masked_fill(~tokens.valid, height)
        order = best.gather(1, row_rank.gather(1, best).sort(dim=1, stable=True).indices)
        return ascending(order[:, :num_keep], tokens.valid, tokens.num_tokens)


def _variance(scores: Tensor, valid: Tensor | None) -> Tensor:
    """[B, 1] over the real tokens of an image."""
    if valid is None:
        return scores.var(dim=1, keepdim=True)
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (scores * valid).sum(dim=1, keepdim=True) / count
    return ((scores - mean) * valid).square().sum(dim=1, keepdim=True) / count
