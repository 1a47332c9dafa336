"""From scores to gates 0..1 that gradients pass through: what stands in training for the top K.

All of it is per image: no image sees another's scores. Scores are taken in fp32 at least, outside
autocast, and nothing waits for the device. Letters beside those of `ocvtp.structures`: s scores, g
gates, tau the temperature; `sg` stops gradients.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ocvtp.ops.selection import descending
from ocvtp.ops.similarity import full
from ocvtp.selectors.budgets import NumKeep, by_row
from ocvtp.selectors.parts import Part, Parts
from ocvtp.selectors.schedules import ScheduleValue, parse_schedule

_HALVINGS = 40
_FLAT = 1e-9


@dataclass(frozen=True)
class Gates:
    """What is left of each token in a training step.

    Args:
        values: [B, N] what a gate in the model reads, with its gradient; 0 on padding.
        hard: [B, N] bool, the K tokens of the highest scores, as drawn ones are: exactly K of an
            image, or all its real ones where it has fewer.
        soft: [B, N] g itself, with its gradient, where `values` are of another kind going forward;
            0 on padding; None where there is no g.
        log_prob: [B] of the tokens that were drawn, in the order of drawing; `sample` only.
    """

    values: Tensor
    hard: Tensor
    soft: Tensor | None = None
    log_prob: Tensor | None = None


def hard_top_k(scores: Tensor, num_keep: NumKeep, real: Tensor) -> Tensor:
    """The K real tokens of the highest score, ties to the lower number.

    Args:
        scores: [B, N], finite.
        num_keep: K, or [B].
        real: [B, N] bool, False on padding.

    Returns:
        [B, N] bool, min(K, real tokens) True in a row.
    """
    order = descending(scores.detach(), real)
    return torch.zeros_like(real).scatter(1, order, _first(order, num_keep)) & real


def _first(order: Tensor, num_keep: NumKeep) -> Tensor:
    """[B, N] bool, the first K places of a row."""
    places = torch.arange(order.shape[1], device=order.device)
    return (places < by_row(num_keep)).expand_as(order)


def soft_topk(scores: Tensor, num_keep: NumKeep, real: Tensor, tau: float) -> Tensor:
    """`g = sigmoid((s + t) / tau)` with t such that the gates of an image sum to K.

    t lies between `tau logit(K / n) - max s` and `tau logit(K / n) - min s`, n real tokens, as all
    gates are at most K / n at the one and at least that at the other; it is found by halving.
    Gradients are exact: `dg_i / ds_j = v_i [i = j] - v_i v_j / sum v` with `v = g (1 - g) / tau`;
    0 where the gates are all but hard (sum v below 1e-9).

    Args:
        scores: [B, N], finite; computed in fp32 at least.
        num_keep: K, or [B]. Where an image has no more real tokens, all its gates are 1.
        real: [B, N] bool, False on padding, whose gates are 0.
        tau: above 0; towards 0 the gates become the hard top K, of which ties share.

    Returns:
        [B, N]
    """
    with torch.autocast(scores.device.type, enabled=False):
        gates: Tensor = _SoftTopK.apply(full(scores), num_keep, real, tau)  # type: ignore[no-untyped-call]
    return gates


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, num_keep: NumKeep, real: Tensor, tau: float) -> Tensor:
        count = real.sum(dim=1, keepdim=True)  # [B, 1]
        num_keep = by_row(num_keep)
        keeps_all = count <= num_keep
        share = (num_keep / count.clamp(min=1).to(scores.dtype)).masked_fill(keeps_all, 0.5)
        # Gates do not change when all scores of an image move. Rounding is least near 0, so the
        # K-th highest, about which the gates open, is moved there.
        falling = scores.masked_fill(~real, -float("inf")).sort(dim=1, descending=True).values
        last = falling.gather(1, (count.clamp(max=num_keep) - 1).clamp(min=0))
        scaled = ((scores - last) / tau).masked_fill(~real, 0)
        low = share.logit() - scaled.amax(dim=1, keepdim=True)
        high = share.logit() - scaled.amin(dim=1, keepdim=True)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            is_low = ((scaled + middle).sigmoid() * real).sum(dim=1, keepdim=True) < num_keep
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        gates = (scaled + (low + high) / 2).sigmoid().masked_fill(keeps_all, 1) * real
        ctx.save_for_backward(gates)
        ctx.tau = tau
        return gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gates,) = ctx.saved_tensors
        slope = gates * (1 - gates) / ctx.tau  # v
        total = slope.sum(dim=1, keepdim=True)
        mean = (slope * gradient).sum(dim=1, keepdim=True) / total.clamp(min=_FLAT)
        return (slope * (gradient - mean)).masked_fill(total < _FLAT, 0), None, None, None


def _through(forward: Tensor, backward: Tensor) -> Tensor:
    """The one going forward, with the gradient of the other."""
    return forward + (backward - backward.detach())


class Relaxation(Part):
    """Scores and K to gates. Holds settings, never parameters.

    A subclass is named by `register_relaxation` and defines `_gates`. It keeps each argument of its
    constructor as the attribute of its name; `parse_schedule` makes one that may change.
    """

    def __call__(
        self,
        scores: Tensor,
        num_keep: NumKeep,
        real: Tensor,
        share: float,
        generator: torch.Generator | None = None,
        training: bool = True,
    ) -> Gates:
        """The gates of one batch.

        Args:
            scores: [B, N], finite.
            num_keep: K, at least 1; or [B] of every row.
            real: [B, N] bool, False on padding.
            share: of the training's steps that are done, 0..1: where schedules are.
            generator: of what is random, on any device; None for torch's own.
            training: False for validation: nothing is drawn.

        Raises:
            ValueError: for shapes that do not go together, or K below 1.
        """
        if isinstance(num_keep, int) and num_keep < 1:
            raise ValueError(f"num_keep={num_keep}; pass at least 1.")
        if scores.ndim != 2 or scores.shape != real.shape:
            raise ValueError(
                f"scores of shape {tuple(scores.shape)} and real tokens of shape"
                f" {tuple(real.shape)}; pass both as [B, N]."
            )
        if not training:
            generator = None
        with torch.autocast(scores.device.type, enabled=False):
            return self._gates(full(scores), num_keep, real, share, generator, training)

    @abstractmethod
    def _gates(
        self,
        scores: Tensor,
        num_keep: NumKeep,
        real: Tensor,
        share: float,
        generator: torch.Generator | None,
        training: bool,
    ) -> Gates:
        """As `__call__`, with scores in fp32 at least and autocast disabled."""


RELAXATIONS: Parts[Relaxation] = Parts("relaxation", Relaxation)  # type: ignore[type-abstract]
_R = TypeVar("_R", bound=type[Relaxation])


def register_relaxation(name: str) -> Callable[[_R], _R]:
    """Class decorator: make a `Relaxation` known under `name`.

    Raises:
        ValueError: if the name is taken or is none, or the class is no relaxation.
    """
    return RELAXATIONS.register(name)  # type: ignore[return-value]


def list_relaxations() -> list[str]:
    """Names of all relaxations, sorted."""
    return RELAXATIONS.names()


def build_relaxation(name: str, **settings: Any) -> Relaxation:
    """Make one, e.g. `build_relaxation("hard_st", tau={"geometric": [1.0, 0.3]})`.

    Raises:
        ValueError: for unknown names and settings, and values out of range.
    """
    return RELAXATIONS.build(name, settings)


class _Tempered(Relaxation):
    """Those with a temperature; the only setting of most."""

    def __init__(self, tau: ScheduleValue = 1.0) -> None:
        self.tau = parse_schedule(tau, "tau", above=0)


@register_relaxation("soft_topk")
class SoftTopK(_Tempered):
    """The gates of `soft_topk`, as VisionSelector has them (arXiv 2510.16598).

    Nothing makes them hard but a low tau, or the loss `binary`.

    Args:
        tau: temperature, above 0; a number or a schedule.
    """

    def _gates(
        self,
        scores: Tensor,
        num_keep: NumKeep,
        real: Tensor,
        share: float,
        generator: torch.Generator | None,
        training: bool,
    ) -> Gates:
        gates = soft_topk(scores, num_keep, real, self.tau.at(share))
        return Gates(gates, hard_top_k(scores, num_keep, real), soft=gates)


@register_relaxation("hard_st")
class HardST(_Tempered):
    """The top K going forward, `soft_topk` going back (straight through).

    The floor lets tokens that are dropped learn: as a bias of `log 0` on its key a token has weight
    exactly 0, and so has its gradient.

    Args:
        tau: temperature, above 0; a number or a schedule.
        floor: value of the tokens beyond the top K, 0..1; a number or a schedule.
    """

    def __init__(self, tau: ScheduleValue = 1.0, floor: ScheduleValue = 1e-3) -> None:
        super().__init__(tau)
        self.floor = parse_schedule(floor, "floor", least=0, most=1)

    def _gates(
        self,
        scores: Tensor,
        num_keep: NumKeep,
        real: Tensor,
        share: float,
        generator: torch.Generator | None,
        training: bool,
    ) -> Gates:
        soft = soft_topk(scores, num_keep, real, self.tau.at(share))
        hard = hard_top_k(scores, num_keep, real)
        values = hard.to(soft.dtype).clamp(min=self.floor.at(share)) * real
        return Gates(_through(values, soft), hard, soft=soft)


@register_relaxation("gumbel_topk")
class GumbelTopK(_Tempered):
    """`soft_topk` of `s + beta Gumbel`: around a set drawn without replacement.

    Args:
        tau: temperature, above 0; a number or a schedule.
        beta: of the noise, at least 0; a number or a schedule. There is none in validation.
    """

    def __init__(self, tau: ScheduleValue = 1.0, beta: ScheduleValue = 1.0) -> None:
        super().__init__(tau)
        self.beta = parse_schedule(beta, "beta", least=0)

    def _gates(
        self,
        scores: Tensor,
        num_keep: NumKeep,
        real: Tensor,
        share: float,
        generator: torch.Generator | None,
        training: bool,
    ) -> Gates:
        if training:
            scores = scores + self.beta.at(share) * gumbel(scores, generator)
        gates = soft_topk(scores, num_keep, real, self.tau.at(share))
        return Gates(gates, hard_top_k(scores, num_keep, real), soft=gates)


@register_relaxation("gumbel_binary")
class GumbelBinary(_Tempered):
    """Each token is kept or not by itself: Gumbel-softmax of two classes, straight through.

    As DynamicViT and Dynamic-LLaVA draw their masks (arXiv 2106.02034, 2412.00876). In training the
    number of tokens kept is not K; the loss `ratio` draws it there. In validation it is the top K.

    Args:
        tau: temperature, above 0; a number or a schedule.
    """

    def _gates(
        self,
        scores: Tensor,
        num_keep: NumKeep,
        real: Tensor,
        share: float,
        generator: torch.Generator | None,
        training: bool,
    ) -> Gates:
        if training:  # the difference of two Gumbels: of the class `kept` and the other
            scores = scores + gumbel(scores, generator) - gumbel(scores, generator)
        soft = (scores / self.tau.at(share)).sigmoid().masked_fill(~real, 0)
        hard = hard_top_k(scores, num_keep, real)
        kept = (scores > 0) & real if training else hard
        return Gates(_through(kept.to(soft.dtype), soft), hard, soft=soft)


@register_relaxation("kept_st")
class KeptST(_Tempered):
    """`1 + g - sg(g)` at the top K, 0 elsewhere: for a gate that drops the rest for real.

    Cheap, as the sequence is short; only tokens that are kept learn.

    Args:
        tau: temperature, above 0; a number or a schedule.
    """

    def _gates(
        self,
        scores: Tensor,
        num_keep: NumKeep,
        real: Tensor,
        share: float,
        generator: torch.Generator | None,
        training: bool,
    ) -> Gates:
        soft = soft_topk(scores, num_keep, real, self.tau.at(share))
        hard = hard_top_k(scores, num_keep, real)
        return Gates(_through(hard.to(soft.dtype), soft) * hard, hard, soft=soft)


@register_relaxation("sample")
class Sample(_Tempered):
    """K tokens drawn one after the other, each by the softmax of `s / tau` of those left.

    Plackett-Luce. The gates have no gradient; `log_prob` has, for the loss `reward`. In validation
    the top K.

    Args:
        tau: temperature, above 0; a number or a schedule.
    """

    def _gates(
        self,
        scores: Tensor,
        num_keep: NumKeep,
        real: Tensor,
        share: float,
        generator: torch.Generator | None,
        training: bool,
    ) -> Gates:
        scores = scores / self.tau.at(share)
        drawn = scores + gumbel(scores, generator) if training else scores
        hard = hard_top_k(drawn, num_keep, real)
        order = descending(drawn.detach(), real)
        log_prob = order_log_prob(scores, order, num_keep, real)
        return Gates(hard.to(scores.dtype), hard, log_prob=log_prob)


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the shape, type and device of a tensor.

    Args:
        generator: on any device; None for torch's own.
    """
    device = like.device if generator is None else generator.device
    waiting = torch.empty(like.shape, dtype=like.dtype, device=device)
    waiting = waiting.exponential_(generator=generator)
    return -waiting.clamp(min=torch.finfo(like.dtype).tiny).log().to(like.device)


def order_log_prob(scores: Tensor, order: Tensor, num_keep: NumKeep, real: Tensor) -> Tensor:
    """Log-probability that the first K tokens of an order are drawn in it, by `softmax(s)`.

    `sum_k s_k - log sum_{j >= k} exp s_j`: each among those that were left.

    Args:
        scores: s [B, N].
        order: [B, N] token numbers, padding last.
        num_keep: K, or [B]; of an image of fewer real tokens, all count.
        real: [B, N] bool, False on padding.

    Returns:
        [B]
    """
    counted = real.gather(1, order)
    s = scores.gather(1, order).masked_fill(~counted, -1e30)
    s = s - s.detach().amax(dim=1, keepdim=True)
    tail = s.flip(1).logcumsumexp(dim=1).flip(1)
    counted = counted & _first(order, num_keep)
    return torch.where(counted, s - tail, 0).sum(dim=1)
