from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.selection import top_k
from ocvtp.ops.similarity import full
from ocvtp.pruners.base import Status
from ocvtp.pruners.layer_pruner import LayerNeeds, OneStagePruner
from ocvtp.pruners.registry import register
from ocvtp.pruners.two_stage import inside, tower_places
from ocvtp.structures import LayerTokens, Needs, Selection, VisualTokens


@register("topv")
@dataclass(kw_only=True, eq=False)
class TopV(OneStagePruner):
    """TopV: keep the tokens whose states cost least to be carried to the normed ones.

    Paper: https://arxiv.org/abs/2503.18278.

    An entropic transport, of three Sinkhorn steps, goes from the image's hidden states before
    a layer to the same after its norm. To carry token i to j costs their squared distance, plus
    1 - exp(-r^2 / 2 sigma^2) at a distance of r tokens, plus how far i is from the centre.

    Args:
        num_keep: tokens kept per image, on average over the layers.
        layer: before which tokens are dropped; paper: 2.
        appearance: weight of the squared distance, as a share of the image's largest; paper: 1.
        relative: weight of the distance between places; paper: 1. 0 with `centre=0` reads no grid.
        centre: weight of the distance from the centre, in tokens; paper: 0.01.
        sigma: in tokens; paper: 10.
        entropy: of the transport, as a share of the unit of cost.
        stages: `((layer, K), ...)` in place of an average.
    Deviations: unofficial. Not known are the entropy, the scale of squared distances, which norm is
        meant (here the one before the attention of the same layer) and how the plan becomes a
        score: here a token's mean cost under it, the lowest stay. Tokens keep their positions.
    """

    appearance: float = 1.0
    relative: float = 1.0
    centre: float = 0.01
    sigma: float = 10.0
    entropy: float = 0.1

    title: ClassVar[str] = (
        "TopV: keep the tokens whose states cost least to be carried to the normed ones."
    )
    reads: ClassVar[str] = "hidden states, grid"
    status: ClassVar[Status] = "unofficial"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2503.18278"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.appearance, self.relative, self.centre) < 0 or self.sigma * self.entropy <= 0:
            raise ValueError(
                f"appearance={self.appearance}, relative={self.relative}, centre={self.centre},"
                f" sigma={self.sigma}, entropy={self.entropy}; pass weights of 0 or more, and sigma"
                " and entropy above 0."
            )

    @property
    def tower_needs(self) -> Needs:
        """The grid, which comes with any need; projected tokens cost nothing."""
        return Needs(projected=bool(self.relative or self.centre))

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds(normed=("layer",))

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        if not isinstance(tokens, LayerTokens):
            raise ValueError(f"{self.name} reads inside the language model; give it LayerTokens.")
        self._check_unpadded(tokens)
        distance = torch.cdist(full(tokens.features), full(tokens.normed["layer"])).square()
        cost = self.appearance * distance / distance.amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
        if self.relative or self.centre:
            cost = cost + self._spatial(tokens)
        return top_k(-mean_costs(cost, self.entropy), num_keep)

    def _spatial(self, tokens: LayerTokens) -> Tensor:
        """[I, N, N] what places add to the costs."""
        height, width = self._grid(inside(self, tokens)[1])
        places = tower_places(tokens)
        at = torch.stack([places // width, places % width], dim=2).float()  # [I, N, 2]
        middle = at.new_tensor([(height - 1) / 2, (width - 1) / 2])
        near = (torch.cdist(at, at).square() / (-2 * self.sigma**2)).exp()
        off_centre: Tensor = (at - middle).norm(dim=2, keepdim=True)
        return self.relative * (1 - near) + self.centre * off_centre


def mean_costs(cost: Tensor, entropy: float, num_steps: int = 3) -> Tensor:
    """[I, N] what each row pays on average under the entropic plan for costs [I, N, N]."""
    kernel = ((cost.amin(dim=(1, 2), keepdim=True) - cost) / entropy).exp()
    columns = torch.ones_like(cost[:, 0])  # masses are all 1: a common scale changes nothing
    for _ in range(num_steps):
        rows = 1 / (kernel @ columns[:, :, None]).squeeze(2).clamp(min=1e-30)
        columns = 1 / (rows[:, None] @ kernel).squeeze(1).clamp(min=1e-30)
    plan = rows[:, :, None] * kernel * columns[:, None]
    return (plan * cost).sum(dim=2) / plan.sum(dim=2).clamp(min=1e-30)
