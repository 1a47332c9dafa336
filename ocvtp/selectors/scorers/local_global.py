"""The scorer of DynamicViT and of Dynamic-LLaVA: a token beside the mean of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocvtp.selectors.blocks import (
    Attention,
    Budget,
    Film,
    check_budget,
    check_heads,
    check_sizes,
    real_mean,
    standardised,
)
from ocvtp.selectors.budgets import NumKeep
from ocvtp.selectors.scorer import Scorer, Scores, Widths, register_scorer
from ocvtp.slots.statistics import FeatureStatistics
from ocvtp.structures import VisualTokens


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, features: Tensor, valid: Tensor | None) -> Tensor:
        normed = self.norm(features)
        features = features + self.attention(normed, normed, valid)
        mixed: Tensor = features + self.mlp(features)
        return mixed


@register_scorer("local_global")
@dataclass(eq=False)
class LocalGlobal(Scorer):
    """Half of a token's features beside the image's mean of the other half, and an MLP to two.

    The score is the log-odds of keeping. Papers: https://arxiv.org/abs/2106.02034 (no blocks) and
    https://arxiv.org/abs/2412.00876 (two).

    Args:
        dim: h; a multiple of 4.
        blocks: of attention among an image's tokens, 0 or more.
        heads: of that attention.
        budget: see `ocvtp.selectors.blocks.Budget`.

    Raises:
        ValueError: for sizes below 1 (blocks: below 0), a `dim` that does not fit, and an unknown
            `budget`.
    """

    dim: int = 512
    blocks: int = 0
    heads: int = 8
    budget: Budget = "none"

    def __post_init__(self) -> None:
        check_sizes(dim=self.dim, heads=self.heads)
        if type(self.blocks) is not int or self.blocks < 0:
            raise ValueError(f"blocks={self.blocks!r}; pass a whole number, at least 0.")
        check_heads(self.dim, self.heads if self.blocks else 1)
        check_heads(self.dim, 1, 4)
        check_budget(self.budget)

    def build(self, widths: Widths) -> None:
        self.inputs = FeatureStatistics(widths.projected)
        self.norm = nn.LayerNorm(widths.projected)
        self.reduce = nn.Linear(widths.projected, self.dim)
        self.layers = nn.ModuleList(_Block(self.dim, self.heads) for _ in range(self.blocks))
        self.film = Film(self.dim) if self.budget == "film" else None
        self.out = nn.Sequential(
            nn.Linear(self.dim, self.dim // 2),
            nn.GELU(),
            nn.Linear(self.dim // 2, self.dim // 4),
            nn.GELU(),
            nn.Linear(self.dim // 4, 2),
        )

    def forward(self, tokens: VisualTokens, num_keep: NumKeep | None = None) -> Scores:
        assert tokens.projected is not None
        given = standardised(self.inputs, tokens.projected, tokens.valid)
        hidden: Tensor = functional.gelu(self.reduce(self.norm(given)))
        for block in self.layers:
            hidden = block(hidden, tokens.valid)
        if self.film is not None:
            hidden = self.film(hidden, tokens, num_keep)
        own, others = hidden.chunk(2, dim=2)
        mean = real_mean(others, tokens.valid).expand_as(own)
        keep, drop = self.out(torch.cat([own, mean], dim=2)).unbind(dim=2)
        return Scores((keep - drop).float())

    def statistics(self) -> list[tuple[int | str, FeatureStatistics]]:
        return [("projected", self.inputs)]
