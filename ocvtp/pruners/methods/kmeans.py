from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ocvtp.ops.selection import fill_up, spaced
from ocvtp.ops.similarity import full
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens, take


@register("kmeans")
@dataclass(kw_only=True, eq=False)
class KMeans(Pruner):
    """k-means: keep the token nearest to each of K cluster centres, a control.

    Paper: none.

    Lloyd's algorithm from K tokens at equal steps in raster order. Where a cluster runs empty, the
    token farthest from its own centre is kept instead.

    Args:
        num_keep: tokens kept per image.
        iterations: of Lloyd's algorithm.
        space: measure Euclidean distances between `features` of the tower or `projected` tokens.
    Deviations: none.
    """

    iterations: int = 10
    space: Literal["features", "projected"] = "features"

    title: ClassVar[str] = (
        "k-means: keep the token nearest to each of K cluster centres, a control."
    )
    reads: ClassVar[str] = "- (or projected)"
    status: ClassVar[Status] = "control"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space not in ("features", "projected") or self.iterations < 0:
            raise ValueError(
                f"space={self.space!r}, iterations={self.iterations}; pass 'features' or"
                " 'projected', and 0 or more."
            )

    @property
    def needs(self) -> Needs:
        return Needs(projected=self.space == "projected")

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        points = full(getattr(tokens, self.space))  # [B, N, D]
        real = tokens.real
        start, _ = spaced(real, num_keep)
        centres = take(points, start)
        for _ in range(self.iterations):
            members = _members(_distances(points, centres), real)
            size = members.sum(dim=1)[:, :, None]  # [B, K, 1]
            means = members.transpose(1, 2) @ points / size.clamp(min=1)
            centres = torch.where(size > 0, means, centres)
        distances = _distances(points, centres)
        members = _members(distances, real)
        own = distances.masked_fill(members == 0, float("inf"))
        # The two tokens of a pair are equally far from their mean: the first, not rounding, wins.
        lengths = points.square().sum(dim=2) * real
        rounding = 1e-5 * lengths.sum(dim=1) / real.sum(dim=1)
        nearest = own <= own.amin(dim=1, keepdim=True) + rounding[:, None, None]
        medoid = nearest.to(torch.uint8).argmax(dim=1)  # [B, K]
        filled = members.sum(dim=1) > 0
        place = torch.arange(tokens.num_tokens, device=medoid.device)
        chosen = ((medoid[:, :, None] == place) & filled[:, :, None]).any(dim=1)
        return fill_up(chosen, distances.amin(dim=2), num_keep, tokens.valid)


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """[B, N, K] squared distances."""
    dots = points @ centres.transpose(1, 2)
    lengths = points.square().sum(dim=2)[:, :, None]
    return lengths - 2 * dots + centres.square().sum(dim=2)[:, None]


def _members(distances: Tensor, real: Tensor) -> Tensor:
    """[B, N, K] 1 where a real token belongs to a centre, its nearest."""
    centre = torch.arange(distances.shape[2], device=distances.device)
    member = distances.argmin(dim=2, keepdim=True) == centre
    return (member & real[:, :, None]).to(distances.dtype)
