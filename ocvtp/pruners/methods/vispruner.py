from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.selection import ascending, descending
from ocvtp.ops.similarity import unit
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens, take


@register("vispruner")
@dataclass(kw_only=True, eq=False)
class VisPruner(Pruner):
    """VisPruner: keep the tokens the CLS attends to, and of the rest those without duplicates.

    Paper: https://arxiv.org/abs/2412.01818, section 3.

    The rest, ordered by attention, is thinned out in rounds: every second token is compared with
    the ones between, and the `step` tokens most similar to one of these go.

    Args:
        num_keep: tokens kept per image; paper: 288 to 29 of 576.
        important_ratio: share of them kept by attention; 1 is FasterVLM. Paper: 0.5.
        step: tokens that go in one round; official code: 8.
        block: block of the tower whose attention is read; paper: 22 of 24, LLaVA's selected one.
    Deviations: none; the official code fails where the rest is odd in number, ours does not.
    """

    important_ratio: float = 0.5
    step: int = 8
    block: int = -2

    title: ClassVar[str] = (
        "VisPruner: keep the tokens the CLS attends to, and of the rest those without duplicates."
    )
    reads: ClassVar[str] = "attention (CLS)"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2412.01818"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important_ratio <= 1 or self.step < 1:
            raise ValueError(
                f"important_ratio={self.important_ratio}, step={self.step}; pass a share of the"
                " budget, 0 to 1, and at least 1."
            )

    @property
    def needs(self) -> Needs:
        return Needs(attention=((self.block, "cls"),))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        order = descending(tokens.attention[self.block, "cls"], tokens.valid)
        num_important = int(num_keep * self.important_ratio)
        important, rest = order[:, :num_important], order[:, num_important:]
        diverse = num_keep - num_important
        if diverse == 0:
            return ascending(important, tokens.valid, tokens.num_tokens)
        left = self._thin_out(tokens, rest, diverse)
        picks = torch.cat([important, rest.gather(1, left)], dim=1)
        return ascending(picks, tokens.valid, tokens.num_tokens)

    def _thin_out(self, tokens: VisualTokens, rest: Tensor, target: int) -> Tensor:
        """[B, target] places in `rest` [B, R]."""
        directions = take(unit(tokens.features), rest)
        cosine = directions @ directions.transpose(1, 2)  # [B, R, R], once
        size = rest.shape[1]
        count = None  # [B, 1] real tokens, where images differ
        if tokens.valid is not None:
            count = tokens.valid.gather(1, rest).sum(dim=1, keepdim=True)
        left = torch.arange(size, device=rest.device).expand(len(rest), -1)
        while size > target:
            drop = min(self.step, size - target, (size + 1) // 2)
            left, count = self._round(cosine, left, count, drop, target)
            size -= drop
        return left

    def _round(
        self, cosine: Tensor, left: Tensor, count: Tensor | None, drop: int, target: int
    ) -> tuple[Tensor, Tensor | None]:
        even, odd = left[:, ::2], left[:, 1::2]
        flat = cosine.flatten(1)
        pairs = (even * cosine.shape[2])[:, :, None] + odd[:, None]  # [B, even, odd]
        near = flat.gather(1, pairs.flatten(1)).view(pairs.shape)
        if count is None:
            by_similarity = near.amax(dim=2).sort(dim=1, descending=True, stable=True).indices
            return torch.cat([even.gather(1, by_similarity[:, drop:]), odd], dim=1), None
        num_even, num_odd = (count + 1) // 2, count // 2
        place = torch.arange(left.shape[1], device=left.device)[None]
        near = near.masked_fill((place[:, : odd.shape[1]] >= num_odd)[:, None], -2.0)
        nearest = near.amax(dim=2).masked_fill(place[:, : even.shape[1]] >= num_even, -3.0)
        even = even.gather(1, nearest.sort(dim=1, descending=True, stable=True).indices)
        gone = (count - target).clamp(min=0, max=self.step).minimum(num_even)
        late_even = (place < gone) | (place >= num_even)
        late_odd = place[:, : odd.shape[1]] >= num_odd
        late = torch.cat([late_even[:, : even.shape[1]], late_odd], dim=1)
        order = late.sort(dim=1, stable=True).indices[:, : left.shape[1] - drop]
        return torch.cat([even, odd], dim=1).gather(1, order), count - gone
