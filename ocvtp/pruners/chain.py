"""Pruners of one stage, one after the other; M tokens are kept by the first, K by the second."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from ocvtp.pruners.base import Pruner
from ocvtp.pruners.budgets import BUDGETS, Budget
from ocvtp.structures import Needs, Selection, VisualTokens, take


class Chain(Pruner):
    """Pruners that choose from what the one before has left.

    `Chain([build_pruner("fastervlm", num_keep=128), build_pruner("divprune", num_keep=64)])` keeps
    the 64 most diverse of the 128 most attended tokens.

    Args:
        pruners: two or more of one stage, none with a larger `num_keep` than one before it; only
            the last may merge, and a share that one keeps (`keep_ratio`) is of what it is given.

    Raises:
        ValueError: if that is not so.
    """

    def __init__(self, pruners: Sequence[Pruner]) -> None:
        self.steps = tuple(pruners)
        if len(self.steps) < 2:
            raise ValueError(f"Chain got {len(self.steps)} pruners; pass two or more.")
        stages = {step.stage for step in self.steps}
        if len(stages) > 1:
            raise ValueError(
                f"Chain got pruners of stages {', '.join(sorted(stages))}; pass pruners of one"
                " stage, and Compose those of different ones."
            )
        for step in self.steps:
            if len(step.parts) > 1:
                raise ValueError(
                    f"{step.name!r} acts at several stages, of which a Chain would run one; Compose"
                    " it with pruners of other stages, or attach it alone."
                )
        for step in self.steps[:-1]:
            if step.merging:
                raise ValueError(
                    f"{step.name!r} merges tokens, so what it leaves has no attention or keys to"
                    " choose by; put it last."
                )
        self._check_counts()
        last = self.steps[-1]
        super().__init__(**{name: getattr(last, name) for name in BUDGETS})
        self.name = ">".join(step.name for step in self.steps)  # type: ignore[misc]
        self.stage = last.stage  # type: ignore[misc]
        self.status = "unofficial"  # type: ignore[misc]
        self.merging = last.merging  # type: ignore[misc]
        self.needs  # noqa: B018 - refuses what does not go together

    def __post_init__(self) -> None:
        """The steps checked their budgets."""

    def _check_counts(self) -> None:
        """A cap may be larger than what is there; a count may not."""
        before, fewest = "", None
        for step in self.steps:
            if fewest is not None and step.num_keep is not None and step.num_keep > fewest:
                raise ValueError(
                    f"Chain got {step.name!r} with num_keep={step.num_keep} after {before!r}, which"
                    f" leaves {fewest}; pass budgets that do not grow."
                )
            most = step.max_keep if step.num_keep is None else step.num_keep
            if most is not None and (fewest is None or most < fewest):
                before, fewest = step.name, most

    @property
    def exact(self) -> bool:
        return all(step.exact for step in self.steps)

    @property
    def needs(self) -> Needs:
        return reduce(or_, (step.needs for step in self.steps))

    @property
    def amounts(self) -> tuple[Budget, ...]:
        return tuple(amount for step in self.steps for amount in step.amounts)

    @property
    def keeps_share(self) -> bool:
        return any(step.keeps_share for step in self.steps)

    def of_size(self, num_tokens: int) -> Chain:
        changed, steps = copy(self), []
        for step in self.steps:
            steps.append(step.of_size(num_tokens))
            num_tokens = step.budget(num_tokens)
        changed.steps = tuple(steps)
        for name in BUDGETS:
            setattr(changed, name, getattr(steps[-1], name))
        return changed

    def with_budget(self, budget: Budget) -> Chain:
        """With a last pruner of another budget."""
        return Chain([*self.steps[:-1], self.steps[-1].with_budget(budget)])

    def select(self, tokens: VisualTokens) -> Selection:
        selection = self.steps[0].select(tokens)
        for step in self.steps[1:]:
            left = _take(tokens, selection)
            selection = _of_all(step.select(left), selection.keep_indices, tokens)
        return selection

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        return self.select(tokens)


def _take(tokens: VisualTokens, selection: Selection) -> VisualTokens:
    """The tokens that are left; they are no grid any more."""
    keep = selection.keep_indices  # [B, M]
    per_token = ("features", "hidden", "attention", "keys", "projected", "clip_visual")
    alone = VisualTokens(grid_hw=tokens.grid_hw, **{n: getattr(tokens, n) for n in per_token})
    left = alone.map(lambda values: take(values, keep))
    return replace(tokens, valid=selection.valid, **{n: getattr(left, n) for n in per_token})


def _of_all(selection: Selection, among: Tensor, tokens: VisualTokens) -> Selection:
    """A selection among tokens `among` [B, M], as one among all N."""
    keep = among.gather(1, selection.keep_indices)
    if selection.merge is None:
        return replace(selection, keep_indices=keep)
    columns = torch.cat([torch.zeros_like(among[:, :1]), 1 + among], dim=1)  # the CLS first
    columns = columns[:, None].expand_as(selection.merge)
    width = 1 + tokens.num_tokens
    merge = selection.merge.new_zeros(*selection.merge.shape[:2], width)
    merge = merge.scatter_add(2, columns, selection.merge)
    anchors = None if selection.anchors is None else among.gather(1, selection.anchors)
    return replace(selection, keep_indices=keep, merge=merge, anchors=anchors)
