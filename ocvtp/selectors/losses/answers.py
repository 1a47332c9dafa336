"""Losses on what the frozen language model answers under the gates."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from ocvtp.ops.similarity import full
from ocvtp.selectors.losses.base import Loss, LossValue, Step, mean_of_rows, register_loss
from ocvtp.selectors.schedules import ScheduleValue, number


@register_loss("kl")
class KL(Loss):
    """`T^2 KL(full || pruned)` at each answer token: answer as with all tokens.

    Means over the answer tokens, then over the rows. As in Dynamic-KL (CoViPAL's second stage).

    Args:
        weight: see `Loss`.
        temperature: T, of both sides.
    """

    reads = frozenset({"full", "pruned"})

    def __init__(self, weight: ScheduleValue = 1.0, temperature: float = 1.0) -> None:
        super().__init__(weight)
        self.temperature = number(temperature, "temperature", above=0)

    def _values(self, step: Step) -> LossValue:
        assert step.full_logits is not None
        assert step.pruned_logits is not None
        assert step.owner is not None
        teacher = (full(step.full_logits.detach()) / self.temperature).log_softmax(dim=1)
        student = (full(step.pruned_logits) / self.temperature).log_softmax(dim=1)
        apart = kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
        return mean_of_rows(self.temperature**2 * apart, step.owner, step.tokens.batch_size)


@register_loss("ce")
class CE(Loss):
    """Cross-entropy of the next token, answer tokens alone: answer as the data say.

    Means over the answer tokens, then over the rows.

    Args:
        weight: see `Loss`.
    """

    reads = frozenset({"pruned"})

    def _values(self, step: Step) -> LossValue:
        return _missed(step, step.pruned_logits)


@register_loss("column_ce")
class ColumnCE(Loss):
    """Cross-entropy of the answer after the scorer's own column, with all visual tokens in place.

    The column stands between prompt and answer: from there the frozen model predicts the answer's
    first token, and all further ones read it. It teaches the column alone what a question is about,
    and no score. As in GlimpsePrune. Means over the answer tokens, then over the rows.

    Args:
        weight: see `Loss`.
    """

    reads = frozenset({"column"})

    def _values(self, step: Step) -> LossValue:
        return _missed(step, step.column_logits)


@register_loss("hidden")
class Hidden(Loss):
    """`|pruned - full|^2 / |full|^2` of the last normed states where answer tokens are predicted.

    These are the prompt's last token and the answer's, but its last. Means over them, then over the
    rows.

    Args:
        weight: see `Loss`.
    """

    reads = frozenset({"states"})

    def _values(self, step: Step) -> LossValue:
        assert step.full_states is not None
        assert step.pruned_states is not None
        assert step.owner is not None
        wanted = full(step.full_states.detach())
        error = (full(step.pruned_states) - wanted).square().sum(dim=1)
        length = wanted.square().sum(dim=1).clamp(min=1e-12)
        return mean_of_rows(error / length, step.owner, step.tokens.batch_size)


def _missed(step: Step, logits: Tensor | None) -> LossValue:
    """Cross-entropy of the answers' tokens under logits [T, V] that predict them."""
    assert logits is not None
    assert step.targets is not None
    assert step.owner is not None
    missed: Tensor = cross_entropy(full(logits), step.targets, reduction="none")
    return mean_of_rows(missed, step.owner, step.tokens.batch_size)
