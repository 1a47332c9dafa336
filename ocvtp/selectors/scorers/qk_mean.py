"""The scorer of VisionSelector: how well each token's query fits the keys of all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ocvtp.selectors.blocks import check_sizes, real_mean
from ocvtp.selectors.budgets import NumKeep
from ocvtp.selectors.scorer import Scorer, Scores, Widths, register_scorer
from ocvtp.structures import VisualTokens

_SCALE = 1e-4


@register_scorer("qk_mean")
@dataclass(eq=False)
class QKMean(Scorer):
    """Mean of each token's scaled products with the keys of its image, without a softmax.

    Paper: https://arxiv.org/abs/2510.16598. That is the product with the mean key, so N x N numbers
    are never held. Images are scored apart, where the published code takes a batch for one.

    Args:
        dim: of queries and keys; None for half the width that it reads, as published.

    Raises:
        ValueError: for a size below 1.
    """

    dim: int | None = None

    def __post_init__(self) -> None:
        if self.dim is not None:
            check_sizes(dim=self.dim)

    def build(self, widths: Widths) -> None:
        dim = self.dim or max(1, widths.projected // 2)
        self.to_query = nn.Linear(widths.projected, dim)
        self.to_key = nn.Linear(widths.projected, dim)
        for linear in (self.to_query, self.to_key):
            nn.init.normal_(linear.weight, std=_SCALE)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: VisualTokens, num_keep: NumKeep | None = None) -> Scores:
        assert tokens.projected is not None
        given = tokens.projected.to(self.to_query.weight.dtype)
        if tokens.valid is not None:
            given = given.masked_fill(~tokens.valid[:, :, None], 0.0)
        key = self.to_key(real_mean(given, tokens.valid))  # [B, 1, h], linear: the mean key
        values: Tensor = (self.to_query(given) * key).sum(dim=2) * key.shape[2] ** -0.5
        return Scores(values.float())
