"""Which token each slot takes: the slots' shares of tokens, and a greedy one-to-one choice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PairsStep = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`pairs_step`, or what `torch.compile` makes of it."""


def token_shares(attention: Tensor) -> Tensor:
    """`w = A / sum_n A`: how much of a slot each token is.

    Args:
        attention: [B, S, N], a softmax over slots, 0 on padding tokens.

    Returns:
        [B, S, N] in fp32 at least; rows sum to 1.
    """
    shares = attention if attention.dtype == torch.float64 else attention.float()
    return shares / shares.sum(dim=2, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)


def pairs_step(left: Tensor) -> tuple[Tensor, Tensor]:
    """A step of `greedy_pairs`, the same in every step.

    Args:
        left: [B, R, C], what is left of the scores. The row and the column taken become -inf.

    Returns:
        row [B] and column [B].
    """
    batch, height, width = left.shape
    best = left.view(batch, -1).argmax(dim=1)
    row, column = best // width, best % width
    left.scatter_(1, row[:, None, None].expand(-1, 1, width), float("-inf"))
    left.scatter_(2, column[:, None, None].expand(-1, height, 1), float("-inf"))
    return row, column


@torch.no_grad()
def greedy_pairs(scores: Tensor, num: int, step: PairsStep = pairs_step) -> tuple[Tensor, Tensor]:
    """Take the highest score, delete its row and its column, and repeat.

    Each step reads all scores once: `num` passes over [B, R, C].

    Args:
        scores: [B, R, C], above -inf.
        num: of pairs, at most R and at most C.
        step: `pairs_step`, compiled or not.

    Returns:
        rows [B, num] and columns [B, num] in the order of taking. Ties go to the lower row, then to
        the lower column.
    """
    left = scores.clone(memory_format=torch.contiguous_format)
    rows, columns = zip(*[step(left) for _ in range(num)], strict=True)
    return torch.stack(rows, dim=1), torch.stack(columns, dim=1)


def one_to_one(
    attention: Tensor, num: int, valid: Tensor | None = None, step: PairsStep = pairs_step
) -> tuple[Tensor, Tensor]:
    """Slots choose different tokens: the largest share first, see `greedy_pairs`.

    Args:
        attention: [B, S, N], a softmax over slots, 0 on padding tokens.
        num: of pairs, at most N.
        valid: [B, N] bool, False on padding tokens, which are chosen when no others are left.
        step: of `greedy_pairs`.

    Returns:
        slots [B, num] and tokens [B, num] in the order of choosing.

    Raises:
        ValueError: if there are fewer than `num` slots.
    """
    if num > attention.shape[1]:
        raise ValueError(
            f"{attention.shape[1]} slots cannot choose {num} tokens, one each; pass at least {num}"
            " slots."
        )
    shares = token_shares(attention.detach())
    if valid is not None:
        shares = shares.masked_fill(~valid[:, None], -1.0)
    return greedy_pairs(shares, num, step)


def slot_choices(attention: Tensor, valid: Tensor | None = None) -> Tensor:
    """[B, N] bool, the real tokens that slots choose by `one_to_one`: S of them, or all."""
    tokens = one_to_one(attention, min(attention.shape[1:]), valid)[1]
    chosen = torch.zeros(len(tokens), attention.shape[2], dtype=torch.bool, device=tokens.device)
    chosen = chosen.scatter(1, tokens, True)
    return chosen if valid is None else chosen & valid


def tokens_of_slots(
    attention: Tensor, valid: Tensor | None = None, step: PairsStep = pairs_step
) -> Tensor:
    """[B, S] the token of every slot by `one_to_one`; needs S <= N."""
    slots, tokens = one_to_one(attention, attention.shape[1], valid, step)
    return torch.empty_like(tokens).scatter_(1, slots, tokens)
