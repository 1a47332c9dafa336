from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.patch_colours import groups, histograms, redundant, sparing_order
from ocvtp.ops.selection import ascending, descending, top_k
from ocvtp.pruners.base import AdaptivePruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Selection, Stage, VisualTokens


@register("vprune")
@dataclass(kw_only=True, eq=False)
class VPrune(AdaptivePruner):
    """V-PRUNE: leave out patches that look like a neighbour, before the vision tower.

    Paper: Applied Sciences 2025, 15(17), 9463.

    In groups of 2 x 2 patches, those whose colour histograms are close (chi-square distance) and
    whose colours point the same way (cosine) are redundant; in raster order, a patch is dropped
    if a kept one of its group is like it. The tower encodes what is left, with the positions that
    it had.

    Args:
        num_keep: patches kept per image (per tile, where there are tiles): the closest pairs of all
            groups lose their later patch first; when every group has one left, these are grouped in
            turn. None to count by the thresholds.
        adaptive: count by the thresholds; with `num_keep`, at most so many stay.
        tau_chi: the largest chi-square distance of redundant patches; paper: 5, 10 or 20.
        tau_cos: the smallest cosine of redundant patches.
        bins: of a histogram of one colour.
        group_side: patches on the side of a group.
    Deviations: unofficial, from the paper's description without its equations: the form of the
        distance, the bins and `tau_cos` are guesses. An exact K is ours.
    """

    tau_chi: float = 5.0
    tau_cos: float = 0.95
    bins: int = 16
    group_side: int = 2

    title: ClassVar[str] = (
        "V-PRUNE: leave out patches that look like a neighbour, before the vision tower."
    )
    reads: ClassVar[str] = "-"
    stage: ClassVar[Stage] = "pixels"
    status: ClassVar[Status] = "unofficial"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bins <= 256:
            raise ValueError(f"bins={self.bins}; pass 1 to 256.")
        if self.group_side < 2:
            raise ValueError(f"group_side={self.group_side}; pass at least 2 patches.")
        if self.tau_chi < 0 or not -1 <= self.tau_cos <= 1:
            raise ValueError(
                f"tau_chi={self.tau_chi}, tau_cos={self.tau_cos}; pass a distance from 0 on and a"
                " cosine of -1 to 1."
            )

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        grid = self._grid(tokens)
        colours = histograms(tokens.features, self.bins)
        stays = sparing_order(colours, grid, self.group_side, tokens.valid)
        if self.exact:
            return top_k(stays, num_keep, tokens.valid)
        kept = tokens.real & ~self._redundant(tokens, colours, grid)
        order = descending(stays, kept)[:, :num_keep]
        return ascending(order, kept, tokens.num_tokens)

    def _redundant(self, tokens: VisualTokens, colours: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N] bool, by the thresholds."""
        numbers, inside = groups(grid, self.group_side, colours.device)
        index = numbers.flatten()
        pixels = tokens.features[:, index].unflatten(1, numbers.shape)
        by_group = colours[:, index].unflatten(1, numbers.shape)
        there = tokens.real[:, index].unflatten(1, numbers.shape) & inside
        found = redundant(pixels, by_group, there, (self.tau_chi, self.tau_cos)).flatten(1)
        # Slots beyond the grid repeat patch 0: what they say goes to a spare column.
        target = torch.where(inside.flatten(), index, tokens.num_tokens).expand_as(found)
        mask = found.new_zeros(len(found), tokens.num_tokens + 1)
        return mask.scatter(1, target, found)[:, :-1]
