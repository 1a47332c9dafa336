"""The scorer of GlimpsePrune: attention that tokens got, smoothed by what the tower saw of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocvtp.selectors.blocks import (
    GatedMLP,
    check_heads,
    check_sizes,
    standardised,
    token_fractions,
)
from ocvtp.selectors.budgets import NumKeep
from ocvtp.selectors.scorer import Scorer, Scores, Widths, register_scorer
from ocvtp.slots.statistics import FeatureStatistics, relative_log
from ocvtp.structures import AttentionKey, AttentionKind, LayerTokens, Needs, VisualTokens

_CELLS = 24.0
"""Rows and columns that an image counts as, of any grid: those of LLaVA-1.5's."""
_SLOWEST = 100.0
_ADDED = 0.02
"""Deviation of what is added to a column, before its training."""


class _Block(nn.Module):
    """Queries and keys of what is known and of the condition, values of what is known."""

    def __init__(self, dim: int, condition: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_query_key = nn.Linear(dim + condition, 2 * (dim + condition))
        self.to_value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), GatedMLP(dim, 2 * dim)

    def forward(
        self, known: Tensor, condition: Tensor, places: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        normed = self.norm(known)
        query, key = self.to_query_key(torch.cat([normed, condition], dim=2)).chunk(2, dim=2)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (query, key, self.to_value(normed))
        )
        if places is not None:
            query, key = _turned(query, places), _turned(key, places)
        mask = None if valid is None else valid[:, None, None]
        found = functional.scaled_dot_product_attention(query, key, value, mask)
        read = found.transpose(1, 2).flatten(2)
        known = known + self.out(read)
        mixed: Tensor = known + self.mlp(self.norm_mlp(known))
        return mixed


def _turned(part: Tensor, places: Tensor) -> Tensor:
    """Heads [B, H, N, d], half of d turned by the row, half by the column of [B or 1, N, 2]."""
    count = part.shape[3] // 4
    power = torch.arange(count, device=part.device) / max(1, count)
    angles = _CELLS * places[..., None] / _SLOWEST**power  # [B, N, 2, d / 4]
    angles = angles.flatten(2)[:, None].to(part.dtype)
    first, second = part.chunk(2, dim=3)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=3)


@register_scorer("vip")
@dataclass(eq=False)
class VIP(Scorer):
    """A row of attention through blocks of attention that compare what the tower saw.

    Paper: https://arxiv.org/abs/2508.01548. The row is read as logarithms minus their mean over the
    image. Published are the heads apart of a learnt column (`learnt`); else it is the row of the
    prompt's last token, heads apart (`last_heads`) or not.

    Args:
        block: whose attention is read: of the language model at stage `llm_layers`, else of the
            tower.
        kind: of that attention, see `ocvtp.structures.AttentionKey`.
        hidden: layers of the tower, all of one width.
        dim: h; a multiple of the heads, and with `condition` of four times the heads.
        condition: width to which the tower's layers are reduced together.
        blocks: how many.
        heads: of attention.
        learnt: whether it reads, in place of `kind`, what every head of `block` attends to in a
            column after the prompt that learns, too: before each layer l up to the block
            `RMSNorm(W e_l + b)` is added to it. Of the language model alone.

    Raises:
        ValueError: for sizes below 1, a `dim` that does not fit, an unknown `kind`, no layers, and
            a `block` below 0 of a learnt column.
    """

    block: int = 20
    kind: AttentionKind = "last"
    hidden: list[int] = field(default_factory=lambda: [23, 17, 11, 5])
    dim: int = 256
    condition: int = 512
    blocks: int = 4
    heads: int = 4
    learnt: bool = False

    def __post_init__(self) -> None:
        check_sizes(dim=self.dim, condition=self.condition, blocks=self.blocks, heads=self.heads)
        check_heads(self.dim, self.heads)
        if (self.dim + self.condition) % (4 * self.heads):
            raise ValueError(
                f"dim={self.dim}, condition={self.condition}, heads={self.heads}; pass a dim and a"
                f" condition whose sum is a multiple of {4 * self.heads}."
            )
        if self.kind not in get_args(AttentionKind):
            raise ValueError(
                f"kind={self.kind!r}; pass one of {', '.join(get_args(AttentionKind))}."
            )
        if self.learnt and self.block < 0:
            raise ValueError(
                f"block={self.block}; with learnt: true pass the number of a layer, from 0 on: each"
                " up to it has a vector of its own."
            )
        self.hidden = list(self.hidden)
        if not self.hidden or not all(type(layer) is int for layer in self.hidden):
            raise ValueError(f"hidden={self.hidden}; pass numbers of layers of the tower.")

    @property
    def key(self) -> AttentionKey:
        """What it reads of `attention`."""
        return self.block, self.kind

    @property
    def needs(self) -> Needs:
        if self.learnt:
            return Needs(hidden=tuple(self.hidden), column=self.block)
        return Needs(hidden=tuple(self.hidden), attention=(self.key,))

    def build(self, widths: Widths) -> None:
        self.inputs = nn.ModuleList(FeatureStatistics(widths.tower) for _ in self.hidden)
        self.see = nn.Linear(len(self.hidden) * widths.tower, self.condition)
        self.attended = nn.Linear(self._rows(widths), self.dim)
        self.layers = nn.ModuleList(
            _Block(self.dim, self.condition, self.heads) for _ in range(self.blocks)
        )
        self.norm = nn.LayerNorm(self.dim)
        self.out = nn.Linear(self.dim, 1)
        if self.learnt:
            width = widths.projected
            self.added = nn.Parameter(_ADDED * torch.randn(self.block + 1, width))
            self.to_column, self.norm_column = nn.Linear(width, width), nn.RMSNorm(width, eps=1e-6)
            nn.init.xavier_uniform_(self.to_column.weight)
            nn.init.zeros_(self.to_column.bias)

    def forward(self, tokens: VisualTokens, num_keep: NumKeep | None = None) -> Scores:
        seen = [
            standardised(statistics, tokens.hidden[layer], tokens.valid)
            for layer, statistics in self._measured()
        ]
        condition = self.see(torch.cat(seen, dim=2))
        attention = self._read(tokens)
        if attention.shape[2] != self.attended.in_features:
            raise ValueError(
                f"attention of layer {self.block} is of {attention.shape[2]} heads, and this scorer"
                f" was trained on {self.attended.in_features}; pass a checkpoint that was trained"
                " in this model."
            )
        logs = relative_log(attention, tokens.valid)
        known = self.attended(logs.to(condition.dtype))
        places = token_fractions(tokens)
        for block in self.layers:
            known = block(known, condition, places, tokens.valid)
        values: Tensor = self.out(self.norm(known)).squeeze(2)
        return Scores(values.float())

    def column(self) -> Tensor | None:
        if not self.learnt:
            return None
        column: Tensor = self.norm_column(self.to_column(self.added))
        return column

    def _read(self, tokens: VisualTokens) -> Tensor:
        """[B, N, H], or [B, N, 1]."""
        column = self.column()
        if column is not None:
            assert isinstance(tokens, LayerTokens)
            assert tokens.column is not None
            return tokens.column(column)
        attention = tokens.attention[self.key]
        return attention if attention.ndim == 3 else attention[:, :, None]

    def _rows(self, widths: Widths) -> int:
        """H where heads are apart, else 1.

        Raises:
            ValueError: if nobody says how many there are.
        """
        if self.kind != "last_heads" and not self.learnt:
            return 1
        if widths.heads < 1:
            raise ValueError(
                f"{'learnt=True' if self.learnt else f'kind={self.kind!r}'} reads every attention"
                " head of the language model, and their number is not known; pass Widths(...,"
                " heads=H), or kind='last'."
            )
        return widths.heads

    def _measured(self) -> list[tuple[int, FeatureStatistics]]:
        own = [module for module in self.inputs if isinstance(module, FeatureStatistics)]
        return list(zip(self.hidden, own, strict=True))

    def statistics(self) -> list[tuple[int | str, FeatureStatistics]]:
        return [*self._measured()]
