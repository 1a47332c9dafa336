"""Losses on the gates themselves: hard ones, a number of them, and what drawn ones earn."""

from __future__ import annotations

from typing import get_args

import torch
from torch.nn.functional import binary_cross_entropy

from ocvtp.selectors.losses.base import (
    Earned,
    Loss,
    LossValue,
    Step,
    mean_of_real,
    register_loss,
)
from ocvtp.selectors.parts import one_of
from ocvtp.selectors.schedules import ScheduleValue

_EDGE = 1e-6


@register_loss("binary")
class Binary(Loss):
    """`BCE(g, sg 1[top K])`, the mean over an image's tokens: makes soft gates hard.

    As VisionSelector has it (arXiv 2510.16598), its weight rising.

    Args:
        weight: see `Loss`.
    """

    reads = frozenset({"gates"})

    def _values(self, step: Step) -> LossValue:
        assert step.gates is not None
        if step.gates.soft is None:
            raise ValueError(
                f"the loss {self.name!r} reads soft gates, and this relaxation draws hard ones"
                " alone; choose another relaxation, or leave the loss out."
            )
        soft = step.gates.soft.clamp(_EDGE, 1 - _EDGE)
        missed = binary_cross_entropy(soft, step.gates.hard.to(soft.dtype), reduction="none")
        return LossValue(mean_of_real(missed, step.real).squeeze(1), step.real.any(dim=1))


@register_loss("ratio")
class Ratio(Loss):
    """`(mean g - K / N)^2` over an image's tokens: for `gumbel_binary`, whose gates sum to any.

    As in DynamicViT and Dynamic-LLaVA (arXiv 2106.02034, 2412.00876), where it weighs 2 and 100.

    Args:
        weight: see `Loss`.
    """

    reads = frozenset({"gates"})

    def _values(self, step: Step) -> LossValue:
        assert step.gates is not None
        count = step.real.sum(dim=1)
        wanted = count.clamp(max=step.num_keep) / count.clamp(min=1)
        mean = mean_of_real(step.gates.values, step.real).squeeze(1)
        return LossValue((mean - wanted).square(), count > 0)


@register_loss("reward")
class Reward(Loss):
    """`-A log p` of drawn sets, `A = (r - mean) / std` among the sets of one question (GRPO).

    Needs the relaxation `sample`. The standard deviation is that of the group, not an estimate of
    a greater one's; where all sets of a question earn the same, A is 0. One set alone does not
    count.

    Args:
        weight: see `Loss`.
        earned: r of a set: `likelihood`, the mean log-likelihood of the answer's tokens with it; or
            `right`, 1 where the model predicts all of these, else 0.
    """

    reads = frozenset({"gates", "reward"})

    def __init__(self, weight: ScheduleValue = 1.0, earned: Earned = "likelihood") -> None:
        super().__init__(weight)
        self.earned = one_of(earned, "earned", get_args(Earned))  # type: ignore[assignment]

    def _values(self, step: Step) -> LossValue:
        assert step.gates is not None
        assert step.reward is not None
        assert step.groups is not None
        log_prob = step.gates.log_prob
        if log_prob is None:
            raise ValueError(
                f"the loss {self.name!r} reads the log-probability of drawn sets, which the"
                " relaxation 'sample' alone has; set model.relaxation to it."
            )
        reward = step.reward.detach().to(log_prob.dtype)
        same = step.groups[:, None] == step.groups[None]  # [B, B]
        size = same.sum(dim=1)
        mean = torch.where(same, reward[None], 0).sum(dim=1) / size
        away = torch.where(same, reward[None] - mean[:, None], 0)
        deviation = (away.square().sum(dim=1) / size).sqrt()
        advantage = (reward - mean) / (deviation + 1e-4)
        return LossValue(-advantage * log_prob, size > 1)
