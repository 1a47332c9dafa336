"""Losses that compare scores with the attention of a layer of the frozen language model."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ocvtp.ops.similarity import full
from ocvtp.selectors.budgets import NumKeep
from ocvtp.selectors.losses.base import Loss, LossValue, Step, mean_of_real, register_loss
from ocvtp.selectors.parts import flag, one_of, whole
from ocvtp.selectors.relaxations import hard_top_k
from ocvtp.selectors.schedules import ScheduleValue, number

Rows = Literal["text", "last"]
_FAINTEST = 1e-4
_FAR = -1e30


class _TeacherLoss(Loss):
    reads = frozenset({"attention"})

    def __init__(self, weight: ScheduleValue, layer: int, rows: str, deposition: bool) -> None:
        super().__init__(weight)
        self.deposition = flag(deposition, "deposition")
        self.layer = whole(layer, "layer", "a layer of the language model")
        self.rows = one_of(rows, "rows", get_args(Rows))

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def _teacher(self, step: Step) -> tuple[Tensor, Tensor]:
        """The attention [B, N], 0 on padding, and whether it tells tokens of an image apart [B]."""
        assert step.teacher is not None
        given = full(step.teacher[self.layer].detach()).masked_fill(~step.real, 0)
        if self.deposition:
            mean = step.deposition[self.layer].to(given)
            given = given / mean.clamp(min=_FAINTEST * mean.mean())
        lowest = given.masked_fill(~step.real, float("inf")).amin(dim=1)
        return given, given.amax(dim=1) > lowest


@register_loss("attention")
class Attention(_TeacherLoss):
    """Score tokens as a layer attends to them.

    `ce`: cross-entropy of softmax(log a / T) and softmax(s) over the image's tokens. `mse`: the
    squared error to log a at mean 0 and standard deviation 1 in the image. Raw a is no target: of N
    tokens it is 1/N in the mean, and so the error about 0 from the first step on.

    Args:
        weight: see `Loss`.
        layer: of the language model, counted from 0.
        rows: whose attention it is: the mean of the prompt's `text` tokens, or its `last` one's.
        temperature: T, of `ce`; above 1 it evens the target out.
        kind: `ce` or `mse`.
        deposition: whether it is divided by its mean at each position over training images, which
            takes away what a layer attends to whatever is there; of images of one grid.
    """

    def __init__(
        self,
        weight: ScheduleValue = 1.0,
        layer: int = 0,
        rows: str = "text",
        temperature: float = 1.0,
        kind: str = "ce",
        deposition: bool = False,
    ) -> None:
        super().__init__(weight, layer, rows, deposition)
        self.temperature = number(temperature, "temperature", above=0)
        self.kind = one_of(kind, "kind", ("ce", "mse"))

    def _values(self, step: Step) -> LossValue:
        attention, tells = self._teacher(step)
        scores, real = full(step.scores), step.real
        if self.kind == "mse":
            target = standardised_log(attention, real)
            return LossValue(mean_of_real((scores - target).square(), real).squeeze(1), tells)
        target = attention.clamp(min=torch.finfo(attention.dtype).tiny).log() / self.temperature
        attended = attention.sum(dim=1) > 0  # the same to all is a target, too
        return LossValue(softmax_cross_entropy(target, scores, real), attended)


@register_loss("rank")
class Rank(_TeacherLoss):
    """Order tokens as a layer's attention does.

    `hinge`, as in Dynamic-KL: `max(0, sum of the top K of (s + margin [not the teacher's top K]) -
    sum of s over the teacher's top K) / K`. `spearman`, as in FlexSelect: 1 - Pearson correlation
    of the teacher's ranks and soft ones, `r_i = sum_j sigmoid((s_i - s_j) / T)`; it holds N x N
    values for each image. `listnet`: cross-entropy of softmax(z / T) and softmax(s), z the log of
    the attention at mean 0 and standard deviation 1.

    Args:
        weight: see `Loss`.
        layer: of the language model, counted from 0.
        rows: whose attention it is: the mean of the prompt's `text` tokens, or its `last` one's.
        kind: `hinge`, `spearman` or `listnet`.
        temperature: T, of the latter two.
        margin: of `hinge`.
        deposition: see `Attention`.
    """

    def __init__(
        self,
        weight: ScheduleValue = 1.0,
        layer: int = 0,
        rows: str = "text",
        kind: str = "hinge",
        temperature: float = 1.0,
        margin: float = 1.0,
        deposition: bool = False,
    ) -> None:
        super().__init__(weight, layer, rows, deposition)
        self.kind = one_of(kind, "kind", ("hinge", "spearman", "listnet"))
        self.temperature = number(temperature, "temperature", above=0)
        self.margin = number(margin, "margin", least=0)

    def _values(self, step: Step) -> LossValue:
        attention, tells = self._teacher(step)
        scores, real = full(step.scores), step.real
        if self.kind == "hinge":
            values = self._hinge(scores, attention, real, step.num_keep)
        elif self.kind == "listnet":
            target = standardised_log(attention, real) / self.temperature
            values = softmax_cross_entropy(target, scores, real)
        else:
            ranks = soft_ranks(scores, real, self.temperature)
            values = 1 - correlation(ranks, hard_ranks(attention, real), real)
        return LossValue(values, tells)

    def _hinge(self, scores: Tensor, attention: Tensor, real: Tensor, num_keep: NumKeep) -> Tensor:
        wanted = hard_top_k(attention, num_keep, real)
        augmented = scores + self.margin * ~wanted
        found = hard_top_k(augmented, num_keep, real)
        gap = (augmented * found).sum(dim=1) - (scores * wanted).sum(dim=1)
        return gap.clamp(min=0) / wanted.sum(dim=1).clamp(min=1)


def softmax_cross_entropy(target: Tensor, scores: Tensor, real: Tensor) -> Tensor:
    """`-sum softmax(target) log softmax(scores)` over real tokens: [B, N] twice to [B]."""
    shares = target.masked_fill(~real, _FAR).softmax(dim=1)
    return -(shares * scores.masked_fill(~real, _FAR).log_softmax(dim=1)).sum(dim=1) * real.any(
        dim=1
    )


def standardised_log(attention: Tensor, real: Tensor) -> Tensor:
    """The log of attention at mean 0 and standard deviation 1 over the real tokens of an image.

    Args:
        attention: [B, N], at least 0. What is below a ten-thousandth of the image's mean counts as
            that, so that none at all, as of rounding, is no outlier.
        real: [B, N] bool.

    Returns:
        [B, N], 0 on padding, and where all are equal.
    """
    mean = mean_of_real(attention, real).clamp(min=torch.finfo(attention.dtype).tiny)
    logs = (attention / mean).clamp(min=_FAINTEST).log()
    logs = (logs - mean_of_real(logs, real)).masked_fill(~real, 0)
    spread = mean_of_real(logs.square(), real).sqrt()
    return torch.where(spread > 1e-6, logs / spread.clamp(min=1e-6), 0)


def soft_ranks(scores: Tensor, real: Tensor, temperature: float) -> Tensor:
    """[B, N] `sum_j sigmoid((s_i - s_j) / T) - 1/2`: how many real tokens lie below each."""
    above = ((scores[:, :, None] - scores[:, None]) / temperature).sigmoid()
    return (above * real[:, None]).sum(dim=2) - 0.5


def hard_ranks(values: Tensor, real: Tensor) -> Tensor:
    """[B, N] how many real tokens lie below each, equals by half."""
    above = (values[:, :, None] > values[:, None]).to(values.dtype)
    equal = (values[:, :, None] == values[:, None]).to(values.dtype)
    return ((above + 0.5 * equal) * real[:, None]).sum(dim=2) - 0.5


def correlation(a: Tensor, b: Tensor, real: Tensor) -> Tensor:
    """[B] Pearson's over real tokens, of ranks [B, N]; 0 where all of one side are equal."""
    count = real.sum(dim=1, keepdim=True).clamp(min=1)
    a, b = a / count, b / count
    a = (a - mean_of_real(a, real)).masked_fill(~real, 0)
    b = (b - mean_of_real(b, real)).masked_fill(~real, 0)
    spread = [mean_of_real(x.square(), real) + 1e-6 for x in (a, b)]
    return (mean_of_real(a * b, real) / (spread[0] * spread[1]).sqrt()).squeeze(1)
