from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ocvtp.ops.diversity import spread
from ocvtp.ops.selection import ascending
from ocvtp.ops.similarity import full, row
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("fps")
@dataclass(kw_only=True, eq=False)
class FPS(Pruner):
    """FPS: farthest-point sampling from the first token on, a control without any saliency.

    Paper: none.

    Args:
        num_keep: tokens kept per image.
        space: measure Euclidean distances between `features` of the tower or `projected` tokens.
    Deviations: none.
    """

    space: Literal["features", "projected"] = "features"

    title: ClassVar[str] = (
        "FPS: farthest-point sampling from the first token on, a control without any saliency."
    )
    reads: ClassVar[str] = "- (or projected)"
    status: ClassVar[Status] = "control"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space not in ("features", "projected"):
            raise ValueError(f"space={self.space!r}; pass 'features' or 'projected'.")

    @property
    def needs(self) -> Needs:
        return Needs(projected=self.space == "projected")

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        points = full(getattr(tokens, self.space))  # [B, N, D]
        halves = points.square().sum(dim=2) / 2

        def nearness(pick: Tensor) -> Tensor:
            """Minus half the squared distance, [B, N]."""
            return row(points, pick) - halves - halves.gather(1, pick[:, None])

        first = torch.zeros_like(points[:, 0, 0], dtype=torch.int64)
        if tokens.valid is not None:
            first = tokens.valid.int().argmax(dim=1)
        picks = spread(nearness, first, num_keep, tokens.valid)
        return ascending(picks, tokens.valid, tokens.num_tokens)
