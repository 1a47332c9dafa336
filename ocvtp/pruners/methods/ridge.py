from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ocvtp import slots
from ocvtp.ops.ridge import (
    WeightKind,
    greedy_ridge,
    greedy_ridge_shares,
    token_weights,
    weight_attention,
)
from ocvtp.ops.selection import ascending, keep_first
from ocvtp.ops.similarity import full
from ocvtp.pruners.base import QualityPruner, Status
from ocvtp.pruners.registry import register
from ocvtp.slots.statistics import FeatureStatistics, centred, standardized
from ocvtp.structures import Needs, Selection, VisualTokens


@register("ridge")
@dataclass(kw_only=True, eq=False)
class Ridge(QualityPruner):
    """Ridge: keep, one by one, the tokens from which ridge regression restores the others best.

    Paper: none.

    Tokens are standardised per feature and centred in their image. Each step picks the token that
    explains the most of what is left of all tokens, every token weighted by its attention to the
    power of 4 / K, and takes its ridge prediction away. The OC-pruner's objective `kept` learns to
    do the same in one forward; this is its teacher.

    Args:
        num_keep: tokens kept per image.
        quality: share of the tokens, as they are weighted, that must be restored; the power is then
            4 over the most that an image may keep.
        weights: of the tokens to restore: attention of the `cls`, `received` attention, or `none`.
        block: block of the tower whose attention is read; the last one.
        power: the weights are attention ** (power / K).
        penalty: of the ridge, a share of the mean squared length of the tokens.
        statistics_of: folder or hub id of an OC-pruner trained for `kept`: the mean and scale of
            each feature over its training images are used; None for those of the image itself.
        statistics: the same in memory, instead of `statistics_of`.
    Deviations: unofficial: our own method, in no paper.
    """

    weights: WeightKind = "cls"
    block: int = -1
    power: float = 4.0
    penalty: float = 0.3
    statistics_of: str | None = None
    statistics: FeatureStatistics | None = field(default=None, repr=False)

    title: ClassVar[str] = (
        "Ridge: keep, one by one, the tokens from which ridge regression restores the others best."
    )
    reads: ClassVar[str] = "attention (CLS or received), or -"
    status: ClassVar[Status] = "unofficial"

    def __post_init__(self) -> None:
        super().__post_init__()
        weight_attention(self.weights, self.block)
        if not self.penalty > 0 or not self.power >= 0:
            raise ValueError(
                f"penalty={self.penalty}, power={self.power}; pass a penalty above 0 and a power of"
                " at least 0."
            )
        if self.statistics_of is not None:
            if self.statistics is not None:
                raise ValueError("got statistics_of and statistics; pass one of them.")
            self.statistics = slots.OCPruner.from_pretrained(self.statistics_of).targets
            if self.statistics is None:
                raise ValueError(
                    f"the OC-pruner {self.statistics_of!r} holds no statistics of the tokens to"
                    " restore; pass one that was trained for `kept`, or nothing."
                )

    @property
    def needs(self) -> Needs:
        return Needs(attention=weight_attention(self.weights, self.block))

    def _takes_turns(self, num_tokens: int, num_keep: int) -> bool:
        return True

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        weights = token_weights(tokens, self.weights, self.block, num_keep, self.power)
        targets = self._targets(tokens)
        given = targets, weights.to(targets), num_keep, self.penalty, tokens.valid
        if self.quality is None:
            return ascending(greedy_ridge(*given), tokens.valid, tokens.num_tokens)
        picks, restored = greedy_ridge_shares(*given)
        count = 1 + (restored < self.quality).sum(dim=1, keepdim=True)
        return keep_first(picks, count, tokens.valid, tokens.num_tokens)

    def _targets(self, tokens: VisualTokens) -> Tensor:
        """What is to be restored, [B, N, D]."""
        features = full(tokens.features)
        if self.statistics is None:
            return standardized(features, tokens.valid)
        return centred(self.statistics.to(features.device)(features), tokens.valid)
