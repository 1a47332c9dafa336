"""Foretell each token of an image from the tokens around it; ours.

A token that its surroundings do not foretell is likely to be the only one that shows something: a
small object, a boundary, a mark. Nothing but images is needed to learn it: no masks, no labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocvtp.field_types import Ranges
from ocvtp.learning import NetworkConfig, Objective, Outcome, PrunerNetwork, Sizes
from ocvtp.slots.statistics import FeatureStatistics, relative_log
from ocvtp.structures import Needs, VisualTokens

_LAYER_SHARE = 3 / 12  # where it was best of 3, 5 and 8 of 12, see docs/photographs.md


@dataclass(frozen=True)
class SurpriseSizes(Sizes):
    """Sizes that may be chosen for any tower.

    Args:
        hidden_dim: of what is read of a token, and of what foretells one.
        reach: how many rows and columns of tokens to each side are read.
    """

    ranges: ClassVar[Ranges] = {"hidden_dim": (1, 2**20), "reach": (1, 2**10)}

    hidden_dim: int = 128
    reach: int = 3

    def __post_init__(self) -> None:
        if self.hidden_dim < 1 or self.reach < 1:
            raise ValueError(
                f"hidden_dim={self.hidden_dim}, reach={self.reach}; pass whole numbers above 0."
            )


class SurpriseNetwork(PrunerNetwork):
    """A token [D] from the `(2 reach + 1)^2 - 1` tokens around it on the grid.

    Tokens are standardised by the statistics of the training images and reduced to `hidden_dim`
    numbers each; a convolution whose centre is closed reads them, and two linear layers foretell
    the standardised token. Beyond the grid, and on padding, tokens are the mean one.

    Raises:
        ValueError: for sizes below 1.
    """

    format: ClassVar[str] = "ocvtp.surprise"
    sizes_class: ClassVar[type[Any]] = SurpriseSizes
    compiled: ClassVar[tuple[str, ...]] = ("errors",)
    config: NetworkConfig[SurpriseSizes]
    open: Tensor

    def __init__(self, config: NetworkConfig[SurpriseSizes]) -> None:
        super().__init__(config)
        dim, hidden, reach = config.feature_dim, config.sizes.hidden_dim, config.sizes.reach
        self.inputs = FeatureStatistics(dim)
        self.reduce = nn.Linear(dim, hidden, bias=False)
        self.look = nn.Conv2d(hidden, hidden, 2 * reach + 1, padding=reach)
        self.foretell = nn.Sequential(
            nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )
        centre = torch.ones(2 * reach + 1, 2 * reach + 1)
        centre[reach, reach] = 0
        self.register_buffer("open", centre, persistent=False)

    def errors(self, tokens: VisualTokens) -> Tensor:
        """Mean squared error [B, N] of what is foretold, 0 on padding.

        Raises:
            ValueError: for tokens of another width, or of images that are not all on one grid.
        """
        features = tokens.hidden[self.config.layer]
        (rows, columns), dim = tokens.grid_hw, self.config.feature_dim
        is_one_grid = tokens.grids is None and features.shape[1] == rows * columns
        if features.shape[2] != dim or not is_one_grid:
            of = f"a grid of {rows} x {columns}" if tokens.grids is None else "grids of their own"
            raise ValueError(
                f"features have shape {list(features.shape)} on {of}; this network reads"
                f" [B, rows x columns, {dim}], all images on one grid:"
                f" hidden_states[{self.config.layer}] of {self.config.tower}."
            )
        given = self.inputs(features.float())
        if tokens.valid is not None:
            given = given.masked_fill(~tokens.valid[:, :, None], 0.0)
        places = self.reduce(given).mT.unflatten(2, (rows, columns))  # [B, hidden, H, W]
        weight = self.look.weight * self.open
        seen = functional.conv2d(places, weight, self.look.bias, padding=self.look.padding)
        error: Tensor = (self.foretell(seen.flatten(2).mT) - given).square().mean(dim=2)
        return error if tokens.valid is None else error * tokens.valid

    def surprise(self, tokens: VisualTokens) -> Tensor:
        """`s = 1/2 log error` [B, N], minus its mean over the image; 0 on padding."""
        errors = self.errors(tokens)
        return relative_log(errors, tokens.valid) / 2

    @classmethod
    def build(cls, sizes: Any, objective: Any, /, **origin: Any) -> Self:
        """See `PrunerNetwork.build`.

        Raises:
            ValueError: for a reach beyond the grid, whose weights would never learn.
        """
        furthest = max(origin["grid_hw"]) - 1
        if sizes.reach > furthest:
            raise ValueError(
                f"reach={sizes.reach}; of the tower's {origin['grid_hw'][0]} x"
                f" {origin['grid_hw'][1]} tokens none has another further away than {furthest};"
                f" pass 1 to {furthest}."
            )
        return super().build(sizes, objective, **origin)

    @classmethod
    def default_layer(cls, num_blocks: int) -> int:
        return max(1, round(_LAYER_SHARE * num_blocks))

    def statistics(self) -> list[tuple[int, FeatureStatistics]]:
        return [(self.config.layer, self.inputs)]


class SurpriseObjective(Objective[SurpriseNetwork]):
    """Foretell each token from those around it: mean squared error of standardised tokens."""

    name = "surprise"
    trains = SurpriseNetwork

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=(layer,))

    def __call__(
        self,
        network: SurpriseNetwork,
        tokens: VisualTokens,
        num_keep: int,
        objects: Tensor | None = None,
    ) -> Outcome:
        """See `Objective.__call__`; neither the budget nor objects are read.

        Raises:
            ValueError: see `SurpriseNetwork.errors`.
        """
        del num_keep, objects
        loss = network.errors(tokens).sum() / tokens.real.sum()
        return Outcome(loss, logs={"foretold": 1 - loss.detach()})
