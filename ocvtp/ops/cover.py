"""Taking the tokens that cover an image: facility location, balanced with restoring the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ocvtp.ops.ridge import RidgeSteps
from ocvtp.ops.selection import ceilings
from ocvtp.structures import take

_VALUES_AT_ONCE = 200_000  # 0.8 MB, as much as two blocks of an image with 576 tokens


class CoverGains:
    """What one more token adds to a cover, of every token: `sum_m max(0, k_sm - c_m)`.

    On a CPU the matrix is read in blocks, so that what is made of one stays in a core's cache.

    Args:
        covers: k [B, N, N], what token s covers of token m.
    """

    def __init__(self, covers: Tensor) -> None:
        count = covers.shape[1]
        if covers.device.type == "cpu" and not torch.compiler.is_compiling():
            count = math.ceil(count / max(1, math.ceil(covers.numel() / _VALUES_AT_ONCE)))
        self._blocks = covers.detach().split(count, dim=1)  # picks have no gradient
        self._room = torch.empty_like(self._blocks[0])  # fresh memory at every step costs more

    def __call__(self, covered: Tensor) -> Tensor:
        """[B, N], of what is covered so far, c [B, N]."""
        left = covered.detach()[:, None]
        rooms = (self._room[:, : block.shape[1]] for block in self._blocks)
        added = [
            torch.sub(block, left, out=room).clamp_(min=0).sum(dim=2)
            for block, room in zip(self._blocks, rooms, strict=True)
        ]
        return torch.cat(added, dim=1)


def greedy_cover(
    likeness: Tensor,
    weights: Tensor,
    targets: Tensor,
    num: int,
    balance: float,
    penalty: float = 0.3,
    valid: Tensor | None = None,
) -> Tensor:
    """Take, one by one, the token that covers and restores the most of what is left.

    A taken token s covers token m by `k_sm`. The cover `sum_m omega_m max_s k_sm` gains `f_s` by
    one more token, the ridge restores `r_s` more (`greedy_ridge`, all tokens weighing the same).
    Each step takes the largest `(1 - balance) f_s / sum f + balance r_s / sum r`.

    Args:
        likeness: k [B, N, N], symmetric, at least 0.
        weights: omega [B, N], 0 on padding.
        targets: what is to be restored, [B, N, D], 0 on padding.
        num: K, at most N.
        balance: 0 covers alone, 1 restores alone.
        penalty: of the ridge, see there.
        valid: [B, N] bool; padding is taken when nothing else is left.

    Returns:
        [B, K] token numbers in the order of taking, unique. Ties go to the lower number.
    """
    real = torch.ones_like(weights, dtype=torch.bool) if valid is None else valid
    even = real.to(targets.dtype) / real.sum(dim=1, keepdim=True)
    restored = RidgeSteps(targets, even, num, penalty)
    covers = likeness * weights[:, None]  # [B, N, N], omega_m k_sm
    gains = CoverGains(covers)
    covered = torch.zeros_like(weights)  # max_s omega_m k_sm
    most = ceilings(weights, valid)
    picks = []
    for _ in range(num):
        more_covered, more_restored = _shares(gains(covered), real), _shares(restored.gains(), real)
        score = (1 - balance) * more_covered + balance * more_restored
        pick = torch.fmin(score, most).argmax(dim=1, keepdim=True)  # [B, 1]
        picks.append(pick)
        most = most.scatter(1, pick, float("-inf"))
        covered = torch.maximum(covered, take(covers, pick).squeeze(1))
        restored.take(pick)
    return torch.cat(picks, dim=1)


def likeness(
    directions: Tensor,
    grid_hw: tuple[int, int],
    power: float,
    spread: float,
    longer: Tensor | None = None,
) -> Tensor:
    """`k_nm = max(cos(y_n, y_m), 0)^power exp(-d_nm^2 / (2 sigma^2))`, [B, N, N].

    Args:
        directions: [B, N, D] of length 1; N = H W.
        grid_hw: H and W.
        power: of the cosine, above 0.
        spread: sigma as a share of the longer side of the grid; d is the distance on the grid.
        longer: [B, 1] that side, of images that do not fill the grid; None where all do.
    """
    rows, columns = grid_hw
    device = directions.device
    places = torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device)
    ).to(directions.dtype)
    squared = (places[:, None] - places[None]).square().sum(dim=2)
    twice: float | Tensor = 2 * (spread * max(grid_hw)) ** 2
    if longer is not None:  # rounded as a number is, so that an image is the same beside padding
        twice = (2 * (spread * longer.double()) ** 2).to(squared.dtype)[:, :, None]
    near = torch.exp(-squared / twice)
    return (directions @ directions.mT).clamp(min=0).pow(power) * near


def _shares(gains: Tensor, real: Tensor) -> Tensor:
    """[B, N] of the whole gain of an image; 0 where there is none."""
    gains = gains * real
    return gains / gains.sum(dim=1, keepdim=True).clamp(min=torch.finfo(gains.dtype).tiny)
