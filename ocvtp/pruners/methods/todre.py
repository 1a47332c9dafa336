from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ocvtp.ops.diversity import spread, total
from ocvtp.ops.selection import ascending, descending
from ocvtp.ops.similarity import Cosines, pairs_pay
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.layer_pruner import LayerNeeds, LayerPruner, LayerStage
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("todre")
@dataclass(kw_only=True, eq=False)
class ToDRE(Pruner):
    """ToDRE: start from the token the CLS attends to most, add the least similar ones in total.

    Paper: https://arxiv.org/abs/2505.18757, Alg. 1, and with `later` stage 2.

    Each further pick has the least sum of cosines to those picked before.

    Args:
        num_keep: tokens kept per image.
        block: block of the tower whose attention is read; paper: the last one.
        later: whether all tokens of an image are dropped before layer 7L/8 of L if the text
            after it gives it less than `threshold` of its attention (of the layer before).
        threshold: paper: 0.1.
    Deviations: unofficial, written from the paper's algorithm. Stage 1 alone is the default; the
        share of attention is that of each image, and the mean over the text after it.
    """

    block: int = -1
    later: bool = False
    threshold: float = 0.1

    title: ClassVar[str] = (
        "ToDRE: start from the token the CLS attends to most, add the least similar ones in total."
    )
    reads: ClassVar[str] = "attention (CLS), projected"
    status: ClassVar[Status] = "unofficial"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2505.18757"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}; pass a share of attention, 0 to 1.")

    @property
    def parts(self) -> tuple[Pruner, ...]:
        if not self.later:
            return (self,)
        return replace(self, later=False), _Later(threshold=self.threshold)

    @property
    def needs(self) -> Needs:
        return Needs(attention=((self.block, "cls"),), projected=True)

    def _takes_turns(self, num_tokens: int, num_keep: int) -> bool:
        return not pairs_pay(num_tokens, num_keep)

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        assert tokens.projected is not None
        pivot = descending(tokens.attention[self.block, "cls"], tokens.valid)[:, 0]
        cosines = Cosines(tokens.projected, num_keep)
        picks = spread(cosines, pivot, num_keep, tokens.valid, accumulate=total)
        return ascending(picks, tokens.valid, tokens.num_tokens)


@dataclass(kw_only=True, eq=False)
class _Later(LayerPruner):
    """Inside the language model: all tokens of an image, or none."""

    threshold: float

    name: ClassVar[str] = "todre"
    status: ClassVar[Status] = "unofficial"
    published: ClassVar[bool] = True

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds(attention=((layer - 1, "text"),))

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return (7 * num_layers // 8,)

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        return (LayerStage(7 * num_layers // 8, num_tokens),)

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        share = tokens.attention[layer - 1, "text"].sum(dim=1, keepdim=True)  # [I, 1]
        everything = torch.arange(tokens.num_tokens, device=share.device)
        keep = everything.repeat(tokens.batch_size, 1)
        return Selection(keep, (share >= self.threshold).expand_as(keep))
