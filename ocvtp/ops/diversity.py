"""Greedy choices: K steps over all images of a call, each reading one row of the kernel.

A similarity that is no number counts as none that is known: picks stay unique, at no further step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ocvtp.ops.similarity import Cosines

_OUTSIDE = 1e30  # more similar than any candidate, less than a chosen token


Kernel = Callable[[Tensor], Tensor]
"""[B] token numbers to their similarity to all tokens, [B, N]."""


def total(similarity: Tensor, more: Tensor) -> Tensor:
    """To `accumulate` for the least mean similarity: the sum."""
    return similarity + more.nan_to_num()


def spread(
    kernel: Kernel,
    first: Tensor,
    num: int,
    candidates: Tensor | None = None,
    accumulate: Callable[[Tensor, Tensor], Tensor] = torch.fmax,
) -> Tensor:
    """From a first pick on, pick the token least similar to those before, again and again.

    Args:
        kernel: similarity of one token of every image to all of its tokens.
        first: [B] token numbers.
        num: of picks, the first included.
        candidates: [B, N] bool; others come last. None for all tokens.
        accumulate: `torch.fmax` for max-min diversity, `total` for the least mean similarity.

    Returns:
        [B, num] token numbers in the order of picking, unique.
    """
    if num == 1:
        return first[:, None]
    rest = spread_from(kernel, kernel(first), first[:, None], num - 1, candidates, accumulate)
    return torch.cat([first[:, None], rest], dim=1)


def spread_from(
    kernel: Kernel,
    similarity: Tensor,
    chosen: Tensor,
    num: int,
    candidates: Tensor | None = None,
    accumulate: Callable[[Tensor, Tensor], Tensor] = torch.fmax,
) -> Tensor:
    """`spread` where some tokens are chosen already.

    Args:
        kernel: see `spread`.
        similarity: [B, N], of every token to the chosen ones.
        chosen: [B, n] token numbers, not picked again.
        num: of further picks.
        candidates: see `spread`.
        accumulate: see `spread`.

    Returns:
        [B, num] in the order of picking.
    """
    if candidates is not None:
        similarity = similarity.masked_fill(~candidates, _OUTSIDE)
    similarity = similarity.scatter(1, chosen, float("inf"))
    picks = []
    for step in range(num):
        pick = similarity.argmin(dim=1)
        picks.append(pick)
        if step + 1 < num:
            similarity = accumulate(similarity, kernel(pick))
            similarity.scatter_(1, pick[:, None], float("inf"))
    return torch.stack(picks, dim=1) if picks else chosen[:, :0]


def dpp_map(x: Tensor, quality: Tensor, num: int, valid: Tensor | None) -> Tensor:
    """Greedy MAP of the determinantal point process L_ij = q_i cos_ij q_j.

    Chen et al. 2018 (https://arxiv.org/abs/1709.05135), Alg. 1: Cholesky rows, one a step. Where
    the kernel's rank is used up, the rest is chosen by quality.

    Args:
        x: [B, N, D] of any length.
        quality: [B, N], not negative.
        num: of picks.
        valid: [B, N] bool; padding is picked last.

    Returns:
        [B, num] token numbers in the order of picking, unique.
    """
    cosines = Cosines(x, num)
    gain = quality.square().masked_fill(cosines.lengths == 0, 0.0)  # [B, N], the diagonal
    floor = 10 * torch.finfo(gain.dtype).eps * gain.amax(dim=1, keepdim=True)  # [B, 1]
    late = quality / quality.amax(dim=1, keepdim=True).clamp(min=1e-30) - 2  # in [-2, -1]
    if valid is not None:
        late = late.masked_fill(~valid, -3.0)
        gain = gain.masked_fill(~valid, 0.0)
    basis = gain.new_zeros(len(gain), num, gain.shape[1])  # [B, num, N]
    picks = []
    for step in range(num):
        pick = torch.where(gain > floor, gain, late).argmax(dim=1, keepdim=True)  # [B, 1]
        picks.append(pick)
        alike = cosines(pick[:, 0]) * quality * quality.gather(1, pick)
        done = basis[:, :step]
        at_pick = done.gather(2, pick[:, None].expand(-1, step, 1)).mT  # [B, 1, step]
        left = gain.gather(1, pick)
        scale = left.masked_fill(left <= floor, float("inf")).rsqrt()  # 0 where nothing is left
        new = (alike - (at_pick @ done).squeeze(1)) * scale
        basis[:, step] = new
        gain = gain.addcmul(new, new, value=-1).scatter_(1, pick, float("-inf"))
        late.scatter_(1, pick, float("-inf"))
    return torch.cat(picks, dim=1)
