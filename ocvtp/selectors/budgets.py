"""Budgets of a training: how many tokens of an image are kept, as counts and as shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ocvtp.field_types import count_or_share
from ocvtp.structures import VisualTokens

NumKeep: TypeAlias = int | Tensor
"""K: one number for all images, or [B] int64, one for each."""


def check_budgets(name: str, given: Any, usual: Sequence[float] = ()) -> list[int | float]:
    """Budgets in plain numbers.

    Args:
        name: of the setting.
        given: counts, whole numbers above 0; and shares of an image's real tokens, numbers with a
            point, above 0 and at most 1.0. None for the usual ones.
        usual: those.

    Raises:
        ValueError: for others, and for none.
    """
    given = usual if given is None else given
    found = [count_or_share(value) for value in given] if isinstance(given, Sequence) else []
    budgets = [budget for budget in found if budget is not None]
    if not budgets or len(budgets) < len(found):
        raise ValueError(
            f"{name}={given}; pass at least one: whole numbers of tokens above 0, e.g. 16, or"
            " shares of an image's tokens, e.g. 0.11."
        )
    return budgets


def count_of(budget: float, num_tokens: int) -> int:
    """K of an image of N real tokens; a pruner's `keep_ratio` gives the same."""
    return budget if isinstance(budget, int) else max(1, round(num_tokens * budget))


def counts_of(budget: float, tokens: VisualTokens) -> NumKeep:
    """K of the images of a batch, without waiting for the device.

    Returns:
        [B] where images differ in size and a share is kept; it is that of each one's real tokens.
    """
    if isinstance(budget, int) or tokens.valid is None:
        return count_of(budget, tokens.num_tokens)
    sizes = range(tokens.num_tokens + 1)
    by_size = torch.tensor([count_of(budget, size) for size in sizes], device=tokens.valid.device)
    return by_size[tokens.valid.sum(dim=1)]


def by_row(num_keep: NumKeep) -> NumKeep:
    """K beside values [B, N]: a number, or [B, 1]."""
    return num_keep if isinstance(num_keep, int) else num_keep[:, None]
