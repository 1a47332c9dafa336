from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.merging import (
    merge_rows,
    merged,
)
from ocvtp.ops.selection import descending, mask_of, ranks, top_k
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.budgets import StagePairs
from ocvtp.pruners.layer_pruner import LayerNeeds
from ocvtp.pruners.registry import register
from ocvtp.pruners.two_stage import FirstHalf, LaterHalf, inside, later_settings, of_tower
from ocvtp.structures import Needs, Selection, Stage, VisualTokens


@register("vflowopt")
@dataclass(kw_only=True, eq=False)
class VFlowOpt(Pruner):
    """VFlowOpt: keep what the image's global tokens attend to, recycle the rest, drop again later.

    Paper: https://arxiv.org/abs/2508.05211.

    Global tokens receive more than twice the mean attention; a token's importance is their mean
    attention to it. What is dropped before the language model is averaged onto the most important
    token of its cell of the grid, by importance, if that stays. Before layers 9 and 18 (of 28)
    of the language model half of the tokens is dropped again, by the same importance. `select` on
    tokens outside of a language model keeps K by the first rule.

    Args:
        num_keep: tokens per image, on average over the layers: 1.75 K before the language model,
            then half and a quarter of these.
        cell: side of a cell in tokens; 1 recycles nothing, and reads no grid.
        block: block of the tower whose attention is read; LLaVA's selected one.
        stages: `((layer, K), ...)` inside the language model in place of an average; `num_keep` is
            then what stays before it.
    Deviations: unofficial. Not known are the threshold of global tokens, the size of cells, the
        weights in recycling, the shares that stay (the paper searches them for each model), and
        what scores the tokens later on; its entropy of patches is left out.
    """

    cell: int = 4
    block: int = -2
    stages: StagePairs | None = None

    title: ClassVar[str] = (
        "VFlowOpt: keep what the image's global tokens attend to, recycle the rest, drop again"
        " later."
    )
    reads: ClassVar[str] = "attention (global)"
    stage: ClassVar[Stage] = "llm_layers"
    status: ClassVar[Status] = "unofficial"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2508.05211"
    merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell < 1:
            raise ValueError(f"cell={self.cell}; pass the side of a cell, at least 1 token.")
        self.parts  # noqa: B018 - checks the stages

    @property
    def parts(self) -> tuple[Pruner, ...]:
        settings = later_settings(self, self.stages, lambda ratio: 1.75 * ratio)
        return FirstHalf(self, before=self._before), VFlowOptLater(block=self.block, **settings)

    @property
    def needs(self) -> Needs:
        return Needs(attention=((self.block, "global"),))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        importance = tokens.attention[self.block, "global"]
        kept = top_k(importance, num_keep, tokens.valid)
        return _recycled(kept.keep_indices, importance, tokens.real, self._cells(tokens))

    def _before(self, num_keep: int) -> int:
        """Tokens that stay before the language model, for a budget of K."""
        return num_keep if self.stages is not None else round(1.75 * num_keep)

    def _cells(self, tokens: VisualTokens) -> Tensor:
        """[N] the cell of every token."""
        if self.cell == 1:
            return torch.arange(tokens.num_tokens, device=tokens.features.device)
        height, width = self._grid(tokens)
        token = torch.arange(height * width, device=tokens.features.device)
        row, column = token // width // self.cell, token % width // self.cell
        return row * -(-width // self.cell) + column


def _recycled(kept: Tensor, importance: Tensor, real: Tensor, cells: Tensor) -> Selection:
    """Kept tokens [B, K], those that lead their cell averaged with what is dropped of it."""
    num_keep, num_tokens = kept.shape[1], importance.shape[1]
    cell = cells.expand_as(importance)
    weight = importance.clamp(min=1e-30) * real
    chosen = mask_of(kept, num_tokens) & real
    rank = ranks(descending(importance, real))  # [B, N]
    lowest = torch.full_like(rank, num_tokens).scatter_reduce(1, cell, rank, "amin")
    leads = chosen & (rank == lowest.gather(1, cell))
    row = torch.where(chosen, mask_of(kept, num_tokens).cumsum(dim=1) - 1, num_keep)
    leader = torch.full_like(rank, num_keep).scatter_reduce(
        1, cell, torch.where(leads, row, num_keep), "amin"
    )  # the row of each cell's leader
    row_of = torch.where(chosen | ~real, row, leader.gather(1, cell))
    shared = torch.where(chosen & ~leads, 0.0, weight)
    total = torch.zeros_like(weight).scatter_add(1, cell, shared).gather(1, cell)
    weight = torch.where(chosen & ~leads, 1.0, shared / total.clamp(min=1e-37))
    return merged(merge_rows(row_of, weight, num_keep), kept)


@dataclass(kw_only=True, eq=False)
class VFlowOptLater(LaterHalf):
    """The importance that the tower gave, again, see `VFlowOpt`."""

    block: int

    name: ClassVar[str] = "vflowopt"
    status: ClassVar[Status] = "unofficial"
    proportions: ClassVar[tuple[int, ...]] = (2, 1)

    @property
    def tower_needs(self) -> Needs:
        return Needs(attention=((self.block, "global"),))

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds()

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return round(9 * num_layers / 28), round(18 * num_layers / 28)

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        here, tower = inside(self, tokens)
        return top_k(of_tower(here, tower.attention[self.block, "global"]), num_keep)
