"""Choosing tokens by score: top-k, filling up, equal steps.

Ties go to the lower index, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ocvtp.structures import Selection


def ascending(indices: Tensor, valid: Tensor | None, num_tokens: int) -> Selection:
    """Chosen indices as a `Selection`: sorted, those of padding tokens last and marked.

    Args:
        indices: [B, K], unique within an image.
        valid: [B, N] bool, or None when all tokens are real.
        num_tokens: N.
    """
    if valid is None:
        return Selection(indices.sort(dim=1).values)
    key = indices + num_tokens * (~valid.gather(1, indices)).long()
    key = key.sort(dim=1).values
    return Selection(key % num_tokens, valid=key < num_tokens)


def together(made: list[Selection]) -> Selection:
    """What was chosen of parts of a batch, as many tokens of each, as one selection."""
    if len(made) == 1:
        return made[0]
    names = [name for name, values in vars(made[0]).items() if values is not None]
    parts = {name: torch.cat([getattr(one, name) for one in made]) for name in names}
    return Selection(**parts)


def top_k(scores: Tensor, num_keep: int, valid: Tensor | None = None) -> Selection:
    """The K tokens of the highest score.

    Args:
        scores: [B, N].
        num_keep: K.
        valid: [B, N] bool; padding tokens come after all others.
    """
    return ascending(descending(scores, valid)[:, :num_keep], valid, scores.shape[1])


def fill_up(
    chosen: Tensor, scores: Tensor, num_keep: int, valid: Tensor | None = None
) -> Selection:
    """All chosen tokens, filled up to K by score; if more than K are chosen, the best of them.

    Args:
        chosen: [B, N] bool.
        scores: [B, N].
        num_keep: K.
        valid: [B, N] bool.
    """
    # Two stable sorts: adding a bonus to the chosen ones' scores would round close scores together.
    order = descending(scores, None)
    first = chosen if valid is None else chosen & valid
    late = (~first).to(torch.int8)
    if valid is not None:
        late = late + (~valid).to(torch.int8)
    rank = late.gather(1, order).sort(dim=1, stable=True).indices
    return ascending(order.gather(1, rank)[:, :num_keep], valid, scores.shape[1])


def spaced(candidates: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Candidates at equal steps in raster order: number floor((i + 1/2) M / num) of M.

    Args:
        candidates: [B, N] bool.
        num: of picks, at most N.

    Returns:
        indices [B, num], unique, and which of them count [B, num]: all where M >= num.
    """
    step = torch.arange(num, device=candidates.device)[None]  # [1, num]
    count = candidates.sum(dim=1, keepdim=True)  # [B, 1]
    picked = count.clamp(max=num)
    rank = (2 * step + 1) * count // (2 * picked).clamp(min=1)
    order = candidates.sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, torch.where(step < picked, rank, step)), step < picked


def mask_of(indices: Tensor, num_tokens: int) -> Tensor:
    """[B, K] indices as a mask [B, N]."""
    mask = torch.zeros(len(indices), num_tokens, dtype=torch.bool, device=indices.device)
    return mask.scatter(1, indices, True)


def ranks(order: Tensor) -> Tensor:
    """The inverse of permutations [B, N]: the place of every token in `order`."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def ceilings(scores: Tensor, valid: Tensor | None) -> Tensor:
    """The most that tokens may score where the best is taken again and again, by `torch.fmin`.

    Who takes a token writes -inf at its place. A score that is no number counts as the best, once:
    picks stay unique.

    Args:
        scores: [B, N], at least 0.
        valid: [B, N] bool; padding is taken when nothing else is left.
    """
    free = torch.full_like(scores, float("inf"))
    return free if valid is None else free.masked_fill(~valid, -1e30)


def descending(scores: Tensor, valid: Tensor | None) -> Tensor:
    """[B, N] token numbers by falling score, padding last."""
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices


def keep_first(order: Tensor, count: Tensor, valid: Tensor | None, num_tokens: int) -> Selection:
    """The first so many tokens of an order.

    Args:
        order: [B, K] token numbers, unique, real ones first.
        count: [B, 1] how many of them stay, at least 1.
        valid: [B, N] bool. num_tokens: N.
    """
    stays = torch.arange(order.shape[1], device=order.device) < count
    kept = torch.zeros(len(order), num_tokens, dtype=torch.bool, device=order.device)
    kept = kept.scatter(1, order, stays)
    return ascending(order, kept if valid is None else kept & valid, num_tokens)


def count_for_share(masses: Tensor, share: float, valid: Tensor | None) -> Tensor:
    """[B, 1] the fewest of the largest masses [B, N] that add up to a share of all, at least 1.

    Args:
        masses: 0 or more. share: above 0, at most 1. valid: [B, N] bool.
    """
    if valid is not None:
        masses = masses.masked_fill(~valid, 0.0)
    held = masses.float().sort(dim=1, descending=True).values.cumsum(dim=1)
    fewer: Tensor = held < share * held[:, -1:]
    return fewer.sum(dim=1, keepdim=True) + 1


def count_outliers(scores: Tensor, valid: Tensor | None) -> Tensor:
    """[B, 1] how many scores lie above Q3 + 1.5 (Q3 - Q1): at most N // 4 + 1 do."""
    if valid is not None:
        scores = scores.masked_fill(~valid, float("nan"))
    low = scores.nanquantile(0.25, dim=1, keepdim=True)  # [B, 1]
    high = scores.nanquantile(0.75, dim=1, keepdim=True)
    outliers: Tensor = scores > high + 1.5 * (high - low)
    return outliers.sum(dim=1, keepdim=True)
