"""What several scorers are built of; h is the width of a scorer.

Inputs are read in the precision of the weights, and padding as zeros, so that nothing that lies
there can reach a real token.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocvtp.selectors.budgets import NumKeep
from ocvtp.slots.positions import token_places
from ocvtp.slots.statistics import FeatureStatistics, image_mean
from ocvtp.structures import VisualTokens

Budget = Literal["none", "film"]
"""Whether a scorer is told the budget: `film` lets it scale and shift the hidden features. Without,
one ranking serves every budget, and the tokens of a smaller one are among those of a larger one."""
_NUM_WAVES = 8
"""Sines, and as many cosines, that a budget is told by."""
_FINEST = 32.0
"""Half waves over the image of the finest sinusoid of a position, of the coarsest 1."""


def check_sizes(**sizes: int) -> None:
    """Refuse sizes that are no whole numbers above 0.

    Raises:
        ValueError: names all that are given.
    """
    if not all(type(size) is int and size >= 1 for size in sizes.values()):
        given = ", ".join(f"{name}={size!r}" for name, size in sizes.items())
        raise ValueError(f"{given}; pass whole numbers above 0.")


def check_heads(dim: int, heads: int, multiple: int = 1) -> None:
    """Refuse a width that heads cannot share, or that positions do not fit.

    Args:
        dim: h. heads: of attention. multiple: of what each head's width must be one.

    Raises:
        ValueError: says what the width must be a multiple of.
    """
    if dim % (heads * multiple):
        raise ValueError(
            f"dim={dim}, heads={heads}; pass a dim that is a multiple of {heads * multiple}."
        )


def check_budget(budget: str) -> None:
    """Refuse an unknown way of telling a budget.

    Raises:
        ValueError: names those that there are.
    """
    if budget not in get_args(Budget):
        raise ValueError(f"budget={budget!r}; pass one of {', '.join(get_args(Budget))}.")


def standardised(statistics: FeatureStatistics, values: Tensor, valid: Tensor | None) -> Tensor:
    """[B, N, D] by the statistics of a data set, zeros on padding."""
    given: Tensor = statistics(values.to(statistics.mean.dtype))
    return given if valid is None else given.masked_fill(~valid[:, :, None], 0.0)


def token_fractions(tokens: VisualTokens) -> Tensor | None:
    """Where each token is in its image: [B or 1, N, 2], down and across, 0 to 1.

    Returns:
        None where the tokens are no whole grid and no views of one are told.
    """
    count, device = tokens.num_tokens, tokens.features.device
    if tokens.grids is not None:
        return token_places(tokens.grids, count)[0]
    height, width = tokens.grid_hw
    if height * width != count:
        return None
    number = torch.arange(count, device=device)
    cell = torch.stack([number // width, number % width], dim=1) + 0.5  # [N, 2]
    rows = torch.full((1,), float(height), device=device)  # filled there: a copy would wait
    if tokens.valid is not None:  # padding is rows that the image lacks
        rows = tokens.valid.sum(dim=1) / width
    shape = torch.stack([rows, torch.full_like(rows, width)], dim=1)
    return cell / shape[:, None].clamp(min=1)


def sinusoids(fractions: Tensor, dim: int) -> Tensor:
    """Places [..., 2] as [..., dim] sines and cosines; dim is a multiple of 4."""
    count = dim // 4
    power = torch.arange(count, device=fractions.device) / max(1, count - 1)
    angles = math.pi * fractions[..., None] * _FINEST**power  # [..., 2, dim / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def real_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean [B, 1, h] over real tokens; 0 where an image has none."""
    if valid is None:
        return values.mean(dim=1, keepdim=True)
    return image_mean(values, valid).nan_to_num()


class Film(nn.Module):
    """Scales and shifts features by the share of tokens that are kept, at first by nothing.

    Paper: https://arxiv.org/abs/1709.07871; the share is told by sinusoids of its logarithm.

    Args:
        dim: h.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.told = nn.Linear(2 * _NUM_WAVES, 2 * dim)
        nn.init.zeros_(self.told.weight)
        nn.init.zeros_(self.told.bias)

    def forward(self, features: Tensor, tokens: VisualTokens, num_keep: NumKeep | None) -> Tensor:
        """Features [B, N, h] as they are read at a budget.

        Raises:
            ValueError: without one.
        """
        if num_keep is None:
            raise ValueError(
                "this scorer is told the budget (budget='film'); pass num_keep, or train one with"
                " budget='none'."
            )
        count = tokens.real.sum(dim=1).clamp(min=1)  # [B]
        share = count.clamp(max=num_keep) / count
        waves = 2.0 ** (torch.arange(_NUM_WAVES, device=share.device) - 2)
        angles = share.log()[:, None] * waves
        told = torch.cat([angles.sin(), angles.cos()], dim=1).to(features.dtype)
        scale, shift = self.told(told)[:, None].chunk(2, dim=2)
        changed: Tensor = features * (1 + scale) + shift
        return changed


class Attention(nn.Module):
    """Softmax attention of tokens to keys that are real.

    Args:
        dim: h. heads: of it.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_query = nn.Linear(dim, dim)
        self.to_key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, features: Tensor, context: Tensor, real: Tensor | None) -> Tensor:
        """What [B, N, h] read of [B, M, h], of which `real` [B, M] are there."""
        query = self.to_query(features).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.to_key_value(context).chunk(2, dim=2)
        )
        mask = None if real is None else real[:, None, None]
        found = functional.scaled_dot_product_attention(query, key, value, mask)
        read: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return read


class GatedMLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202).

    Args:
        dim: h. hidden: its inner width.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        """[B, N, h] to [B, N, h]."""
        gate, value = self.up(features).chunk(2, dim=2)
        mixed: Tensor = self.down(functional.silu(gate) * value)
        return mixed
