"""The loss on masks of annotated objects."""

from __future__ import annotations

from torch.nn.functional import binary_cross_entropy_with_logits

from ocvtp.ops.similarity import full
from ocvtp.selectors.losses.base import Loss, LossValue, Step, mean_of_real, register_loss
from ocvtp.selectors.schedules import ScheduleValue, number


@register_loss("mask")
class Mask(Loss):
    """Score the tokens that show the question's objects high: Dice and binary cross-entropy.

    `1 - (2 sum p t + 1) / (sum p + sum t + 1) + bce BCE(p, t)` with p = sigmoid(s) and t the share
    of a token's area that shows them; BCE is the mean over an image's tokens. As GlimpsePrune's
    (arXiv 2508.01548). Scores are pushed below and above 0, so that a threshold of 1/2 on
    sigmoid(s) says how many tokens to keep.

    Args:
        weight: see `Loss`.
        bce: weight of the cross-entropy in it.
        threshold: t is 1 from this share on and 0 below it; None: t is the share. Rows of which no
            token reaches it do not count.
    """

    reads = frozenset({"objects"})

    def __init__(
        self, weight: ScheduleValue = 1.0, bce: float = 0.1, threshold: float | None = None
    ) -> None:
        super().__init__(weight)
        self.bce = number(bce, "bce", least=0)
        if threshold is not None:
            threshold = number(threshold, "threshold", above=0, most=1)
        self.threshold = threshold

    def _values(self, step: Step) -> LossValue:
        assert step.objects is not None
        assert step.has_objects is not None
        scores, real = full(step.scores), step.real
        target = full(step.objects.detach()).masked_fill(~real, 0)
        if self.threshold is not None:
            target = (target >= self.threshold).to(target.dtype)
        share = scores.sigmoid().masked_fill(~real, 0)
        both = (share * target).sum(dim=1)
        dice = 1 - (2 * both + 1) / (share.sum(dim=1) + target.sum(dim=1) + 1)
        missed = binary_cross_entropy_with_logits(scores, target, reduction="none")
        values = dice + self.bce * mean_of_real(missed, real).squeeze(1)
        return LossValue(values, step.has_objects & (target.sum(dim=1) > 0))
