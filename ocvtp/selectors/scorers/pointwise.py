"""A scorer that looks at one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from ocvtp.selectors.blocks import Budget, Film, check_budget, check_sizes, standardised
from ocvtp.selectors.budgets import NumKeep
from ocvtp.selectors.scorer import Scorer, Scores, Widths, register_scorer
from ocvtp.slots.statistics import FeatureStatistics
from ocvtp.structures import VisualTokens


@register_scorer("pointwise")
@dataclass(eq=False)
class Pointwise(Scorer):
    """An MLP on every token by itself; the surrogate of KVzap (https://arxiv.org/abs/2601.07891).

    Args:
        dim: h.
        budget: see `ocvtp.selectors.blocks.Budget`.

    Raises:
        ValueError: for a size below 1, and an unknown `budget`.
    """

    dim: int = 512
    budget: Budget = "none"

    def __post_init__(self) -> None:
        check_sizes(dim=self.dim)
        check_budget(self.budget)

    def build(self, widths: Widths) -> None:
        self.inputs = FeatureStatistics(widths.projected)
        self.norm = nn.LayerNorm(widths.projected)
        self.reduce = nn.Linear(widths.projected, self.dim)
        self.film = Film(self.dim) if self.budget == "film" else None
        self.out = nn.Linear(self.dim, 1)

    def forward(self, tokens: VisualTokens, num_keep: NumKeep | None = None) -> Scores:
        assert tokens.projected is not None
        given = standardised(self.inputs, tokens.projected, tokens.valid)
        hidden: Tensor = functional.gelu(self.reduce(self.norm(given)))
        if self.film is not None:
            hidden = self.film(hidden, tokens, num_keep)
        return Scores(self.out(hidden).squeeze(2).float())

    def statistics(self) -> list[tuple[int | str, FeatureStatistics]]:
        return [("projected", self.inputs)]
