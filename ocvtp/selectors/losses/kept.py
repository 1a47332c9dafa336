"""The loss of restoring all tokens from the kept ones, for any scorer."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ocvtp.ops.ridge import WEIGHT_KINDS, ridge_slopes, token_weights, weight_attention
from ocvtp.ops.similarity import full
from ocvtp.selectors.budgets import by_row
from ocvtp.selectors.losses.base import Loss, LossValue, Step, register_loss
from ocvtp.selectors.parts import flag, one_of, whole
from ocvtp.selectors.schedules import ScheduleValue, number
from ocvtp.slots.statistics import centred, standardized
from ocvtp.structures import Needs, take

Restored = Literal["features", "projected"]


@register_loss("kept")
class Kept(Loss):
    """Restore all tokens from the K hard ones by ridge regression in closed form; ours.

    The error is that of `ocvtp.ops.ridge.ridge_error`, between 0 and 1. Its gradient goes straight
    through to the gates of all tokens: it is that of an error in which each token counts by its
    gate, at the hard ones. No language model is read.

    Args:
        weight: see `Loss`.
        restored: what is: the tower's `features` (those that go to the projector), or the
            `projected` tokens.
        weights: of the tokens to restore: attention of the `cls` token, `received` attention, or
            `none`.
        weight_block: block of the tower whose attention that is.
        weight_power: the weights are attention ** (weight_power / K).
        penalty: of the ridge, a share of the mean squared length of the tokens.
        standardize: whether each feature is divided by its deviation in the image, as the pruner
            `ridge` does; tokens are centred in their image either way.
    """

    reads = frozenset({"gates", "tower"})

    def __init__(
        self,
        weight: ScheduleValue = 1.0,
        restored: str = "features",
        weights: str = "none",
        weight_block: int = -1,
        weight_power: float = 4.0,
        penalty: float = 0.3,
        standardize: bool = True,
    ) -> None:
        super().__init__(weight)
        self.restored = one_of(restored, "restored", get_args(Restored))
        self.weights = one_of(weights, "weights", WEIGHT_KINDS)
        self.weight_block = whole(weight_block, "weight_block", "a block of the vision tower")
        self.weight_power = number(weight_power, "weight_power", least=0)
        self.penalty = number(penalty, "penalty", above=0)
        self.standardize = flag(standardize, "standardize")

    @property
    def needs(self) -> Needs:
        attention = weight_attention(self.weights, self.weight_block)  # type: ignore[arg-type]
        return Needs(attention=attention, projected=self.restored == "projected")

    def _values(self, step: Step) -> LossValue:
        gates, tokens = step.gates, step.tokens
        assert gates is not None
        restored = getattr(tokens, self.restored)
        with torch.no_grad():
            prepare = standardized if self.standardize else centred
            targets = prepare(full(restored), tokens.valid)
            weights = token_weights(
                tokens,
                self.weights,  # type: ignore[arg-type]
                self.weight_block,
                by_row(step.num_keep),
                self.weight_power,
            )
            first = gates.hard.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
            first = first[:, : step.most]
            kept = take(targets, first) * gates.hard.gather(1, first)[:, :, None]
            error, slopes = ridge_slopes(targets, kept, weights, self.penalty)
        moved = gates.values - gates.values.detach()
        return LossValue(error + (slopes * moved).sum(dim=1), targets.square().sum(dim=(1, 2)) > 0)
