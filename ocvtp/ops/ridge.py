"""Restoring all tokens of an image from the kept ones: ridge regression in closed form.

Targets Y [B, N, D] are centred in their image and 0 on padding; weights omega [B, N] sum to 1 over
an image and are 0 on padding.

The penalty of an image is `lambda e` with `e = sum_n omega_n |y_n|^2`, so that it does not depend
on the scale of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ocvtp.ops.selection import ceilings
from ocvtp.ops.similarity import all_pairs
from ocvtp.structures import AttentionKey, VisualTokens, take

WeightKind = Literal["cls", "received", "none"]
WEIGHT_KINDS: tuple[WeightKind, ...] = ("cls", "received", "none")


def weight_attention(kind: WeightKind, block: int) -> tuple[AttentionKey, ...]:
    """The attention that weights of a kind are made of.

    Raises:
        ValueError: for other kinds.
    """
    if kind not in WEIGHT_KINDS:
        raise ValueError(f"weights={kind!r}; pass one of {', '.join(map(repr, WEIGHT_KINDS))}.")
    return () if kind == "none" else ((block, kind),)


def token_weights(
    tokens: VisualTokens, kind: WeightKind, block: int, num_keep: int | Tensor, power: float
) -> Tensor:
    """Weights `attention ** (power / K)`: the fewer are kept, the more salience counts.

    Args:
        tokens: with the attention that `weight_attention` names.
        kind: `cls`, `received`, or `none` for the same weight everywhere.
        block: of the tower whose attention is read.
        num_keep: K, or [B, 1].
        power: 0 for the same weight everywhere.

    Returns:
        [B, N] fp32, 0 on padding; sums to 1, or to 0 where no token is attended to.
    """
    real = tokens.real
    keys = weight_attention(kind, block)
    attention = real.float() if not keys else tokens.attention[keys[0]].float() * real
    tiny = torch.finfo(attention.dtype).tiny
    relative = attention / attention.amax(dim=1, keepdim=True).clamp(min=tiny)
    weights = relative.pow(power / num_keep) * real
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=tiny)


def mean_energy(targets: Tensor, weights: Tensor) -> Tensor:
    """E [B, 1] = sum_n omega_n |y_n|^2, kept from 0 for images that are blank."""
    energy = (weights * targets.square().sum(dim=2)).sum(dim=1, keepdim=True)
    return energy.clamp(min=torch.finfo(energy.dtype).eps)


def straight_through(shares: Tensor, targets: Tensor, chosen: Tensor) -> Tensor:
    """Z = S Y with S = onehot(chosen) + P - stopgrad(P).

    Args:
        shares: P [B, S, N], see `ocvtp.slots.matching.token_shares`.
        targets: Y [B, N, D].
        chosen: [B, S] the token of every slot.

    Returns:
        [B, S, D]: the chosen tokens as they are, with the gradient of P Y.
    """
    soft = shares @ targets
    return take(targets, chosen) + (soft - soft.detach())


def residuals(targets: Tensor, kept: Tensor, energy: Tensor, penalty: float) -> Tensor:
    """[B, N, D] what the kept tokens do not restore of each: `y_n - [...]_n` of `ridge_error`.

    Args:
        targets: Y [B, N, D].
        kept: Z [B, K, D].
        energy: e [B, 1], see `mean_energy`.
        penalty: lambda, above 0.
    """
    identity = torch.eye(kept.shape[1], dtype=kept.dtype, device=kept.device)
    gram = kept @ kept.mT + penalty * energy[:, :, None] * identity  # [B, K, K]
    factor = torch.linalg.cholesky_ex(gram).L  # definite, as the penalty is above 0
    coefficients = torch.cholesky_solve(kept @ targets.mT, factor)  # [B, K, N]
    return targets - coefficients.mT @ kept


def ridge_error(targets: Tensor, kept: Tensor, weights: Tensor, penalty: float = 0.3) -> Tensor:
    """L = sum_n omega_n |y_n - [Y Z^T (Z Z^T + lambda e I)^-1 Z]_n|^2 / e.

    Nothing is learnt between Z and L: there is no decoder that could do without the kept tokens.

    Args:
        targets: Y [B, N, D].
        kept: Z [B, K, D]; zero rows count as nothing.
        weights: omega [B, N].
        penalty: lambda, above 0.

    Returns:
        [B] in 0..1.
    """
    energy = mean_energy(targets, weights)
    residual = residuals(targets, kept, energy, penalty)
    return (weights * residual.square().sum(dim=2)).sum(dim=1) / energy[:, 0]


def ridge_slopes(
    targets: Tensor, kept: Tensor, weights: Tensor, penalty: float = 0.3
) -> tuple[Tensor, Tensor]:
    """The error, and how it changes as any token counts a little more among the kept ones.

    Let every token count by m_n in 0..1, `Z^T Z = sum_n m_n y_n y_n^T`, which for 0 and 1 is that
    of the kept ones. With residuals R, `dL/dm_n = -2 sum_j omega_j (R_n.R_j) (R_n.y_j) / (lambda
    e^2)`: O(N^2 D), and no system larger than K x K is solved.

    Args:
        targets: Y [B, N, D].
        kept: Z [B, K, D]; zero rows count as nothing.
        weights: omega [B, N].
        penalty: lambda, above 0.

    Returns:
        L [B] as `ridge_error`, and dL/dm [B, N].
    """
    energy = mean_energy(targets, weights)
    residual = residuals(targets, kept, energy, penalty)
    error = (weights * residual.square().sum(dim=2)).sum(dim=1) / energy[:, 0]
    y, r = (x / energy[:, :, None].sqrt() for x in (targets, residual))
    slopes = (r @ r.mT) * (r @ y.mT) @ weights[:, :, None]
    return error, -2 / penalty * slopes.squeeze(2)


@torch.no_grad()
def greedy_ridge(
    targets: Tensor,
    weights: Tensor,
    num: int,
    penalty: float = 0.3,
    valid: Tensor | None = None,
    step: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Pick the token that restores the most of what is left, take its part away, and again.

    Per step `s = argmax_s sum_n omega_n (R_n.R_s)^2 / (|R_s|^2 + lambda e)`, then
    `R <- R - (R v) v^T / m` with `v = R_s`, `m = |v|^2 + lambda e`; first R = Y.

    R itself is never formed. With `G = R R^T` and `g = G_s` the deflation is of rank one,
    `G <- G - b g g^T` with `b = (|v|^2 + 2 lambda e) / m^2`, so the numerators follow from two
    products, `q <- q - 2 b g h + b^2 g^2 (omega.g^2)` with `h = G (omega g)`. The first G costs
    N^2 D once, and each step reads it once: O(N^2 D + K N (N + K)) in all, where deflating R and
    comparing all pairs again would cost O(K N^2 D).

    Args:
        targets: Y [B, N, D].
        weights: omega [B, N].
        num: K, at most N.
        penalty: lambda, above 0.
        valid: [B, N] bool; padding is picked when nothing else is left.
        step: `ridge_step`, compiled, which is then called K times; None for steps that leave out
            what is not taken yet.

    Returns:
        [B, K] token numbers in the order of picking, unique. Ties go to the lower number.
    """
    if step is None:
        return greedy_ridge_shares(targets, weights, num, penalty, valid)[0]
    steps = RidgeSteps(targets, weights, num, penalty)
    state = steps.state(ceilings(steps.energy, valid))
    return torch.cat([step(*state) for _ in range(num)], dim=1)


@torch.no_grad()
def greedy_ridge_shares(
    targets: Tensor, weights: Tensor, num: int, penalty: float = 0.3, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `greedy_ridge` picks, and [B, K] the share of the tokens that is restored after each.

    That is `1 - sum_n omega_n |R_n|^2 / e` of what its steps leave; it does not fall.
    """
    steps = RidgeSteps(targets, weights, num, penalty)
    most = ceilings(steps.energy, valid)
    picks, left, energy = [], [], mean_energy(targets, weights)
    for _ in range(num):
        pick = torch.fmin(steps.gains(), most).argmax(dim=1, keepdim=True)  # [B, 1]
        picks.append(pick)
        most = most.scatter(1, pick, float("-inf"))
        steps.take(pick)
        left.append((weights * steps.energy).sum(dim=1, keepdim=True))
    return torch.cat(picks, dim=1), 1 - torch.cat(left, dim=1) / energy


def ridge_step(
    gram: Tensor,
    weights: Tensor,
    floor: Tensor,
    energy: Tensor,
    gain: Tensor,
    done: Tensor,
    most: Tensor,
    number: Tensor,
) -> Tensor:
    """A step of `greedy_ridge` that is the same in every step, for `torch.compile`: one graph.

    All rows of `done` are read, those too that are 0 as nothing was taken yet, and the number of
    the step is on the device.

    Args:
        gram, weights, floor, energy, gain, done: see `RidgeSteps`. The last three are written to.
        most: [B, N], see `ocvtp.ops.selection.ceilings`. It is written to.
        number: [1] of the step, from 0. It is counted up.

    Returns:
        [B, 1] the token taken.
    """
    pick = torch.fmin(gain / (energy + floor), most).argmax(dim=1, keepdim=True)
    most.scatter_(1, pick, float("-inf"))
    found = _deflated(gram, weights, floor, energy, gain, done, pick)
    energy.copy_(found[0])
    gain.copy_(found[1])
    done.index_copy_(1, number, found[2][:, None])
    number.add_(1)
    return pick


class RidgeSteps:
    """What is left to restore while tokens are taken one by one, see `greedy_ridge`.

    Args:
        targets: Y [B, N, D].
        weights: omega [B, N].
        num: most tokens that will be taken.
        penalty: lambda, above 0.

    Attributes:
        energy: [B, N], |R_s|^2.
    """

    def __init__(self, targets: Tensor, weights: Tensor, num: int, penalty: float) -> None:
        self._gram = all_pairs(targets)  # [B, N, N], of Y; what was deflated is in `_done`
        self._weights = weights
        self._floor = penalty * mean_energy(targets, weights)  # [B, 1]
        self.energy = self._gram.diagonal(dim1=1, dim2=2).clone()
        self._gain = _times(self._gram.square(), weights)  # [B, N], the numerators
        # [B, K, N], rows sqrt(b) g
        self._done = self._gain.new_zeros(len(self._gain), num, self._gain.shape[1])
        self._step = 0

    def gains(self) -> Tensor:
        """[B, N] how much each token would restore."""
        return self._gain / (self.energy + self._floor)

    def take(self, pick: Tensor) -> None:
        """Take the tokens [B, 1]."""
        fixed, past = (self._gram, self._weights, self._floor), self._done[:, : self._step]
        self.energy, self._gain, row = _deflated(*fixed, self.energy, self._gain, past, pick)
        self._done[:, self._step] = row
        self._step += 1

    def state(self, most: Tensor) -> tuple[Tensor, ...]:
        """The arguments of `ridge_step`, before the first one."""
        fixed, number = (self._gram, self._weights, self._floor), most.new_zeros(1).long()
        return *fixed, self.energy, self._gain, self._done, most, number


def _deflated(
    gram: Tensor,
    weights: Tensor,
    floor: Tensor,
    energy: Tensor,
    gain: Tensor,
    past: Tensor,
    pick: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy and gain after a pick [B, 1], and its row of `RidgeSteps._done`; see there."""
    at_pick = past.gather(2, pick[:, None].expand(-1, past.shape[1], 1)).squeeze(2)  # [B, step]
    column = take(gram, pick).squeeze(1) - _times(past.mT, at_pick)  # g
    length = energy.gather(1, pick)  # |v|^2
    shrink = (length + 2 * floor) / (length + floor).square()  # b
    salient = weights * column
    shared = _times(gram, salient) - _times(past.mT, _times(past, salient))  # h
    squared = shrink * column.square()
    total = shrink * (salient * column).sum(dim=1, keepdim=True)
    gain = gain - 2 * shrink * column * shared + squared * total
    return (energy - squared).clamp(min=0), gain.clamp(min=0), shrink.sqrt() * column


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """[B, n, m] and [B, m] to [B, n]; a row from the left is several times as fast on a CPU."""
    return (vector[:, None] @ matrix.mT).squeeze(1)
