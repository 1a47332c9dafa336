"""Methods of two halves: one before the language model, one inside it.

N' tokens of an image are left by the first half, of the tower's N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.pruners.base import Pruner
from ocvtp.pruners.budgets import BUDGETS, StagePairs, average_kept, check_stages
from ocvtp.pruners.layer_pruner import LayerPruner, LayerStage, to_average
from ocvtp.structures import LayerTokens, Needs, Selection, VisualTokens, take


class FirstHalf(Pruner):
    """What a method does before the language model, as the pruner that a host attaches there.

    Args:
        whole: the method; its needs are those of this half.
        choose: what it keeps before the language model, where that takes more than a count.
        before: how many tokens that are for a budget of K, where an image has as many.
    """

    def __init__(
        self,
        whole: Pruner,
        choose: Callable[[VisualTokens], Selection] | None = None,
        before: Callable[[int], int] = lambda num_keep: num_keep,
    ) -> None:
        super().__init__(**{name: getattr(whole, name) for name in BUDGETS})
        self._whole, self._choose, self._before = whole, choose, before
        self.name = whole.name  # type: ignore[misc]
        self.status = whole.status  # type: ignore[misc]
        self.merging = whole.merging  # type: ignore[misc]

    @property
    def needs(self) -> Needs:
        return self._whole.needs

    def budget(self, num_tokens: int) -> int:
        return self._whole.budget(num_tokens)

    def spares(self, num_tokens: int) -> bool:
        count = (
            self.max_keep if self.num_keep is None and self.keep_ratio is None else self.num_keep
        )
        return count is not None and num_tokens < self._before(count) + self._is_within_cap(
            num_tokens
        )

    def of_size(self, num_tokens: int) -> Pruner:
        return self._whole.of_size(num_tokens).parts[0] if self.keeps_share else self

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        if self._choose is not None:
            return self._choose(tokens)
        return self._whole._select(tokens, min(self._before(num_keep), tokens.num_tokens))


@dataclass(kw_only=True, eq=False)
class LaterHalf(LayerPruner):
    """What a method does inside the language model, on what its first half left.

    Args:
        keep_ratio: share of the image's tokens, those that the first half dropped included.
        share_before: share of them that the first half leaves where the budget is a share.

    Attributes:
        proportions: of the tokens that are left by its layers, one after the other.
    """

    share_before: float = 1.0

    proportions: ClassVar[tuple[int, ...]]

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        average, layers = self._average(num_tokens), self._layers(num_layers)
        return to_average(layers, self.proportions, num_layers, num_tokens, average)

    def _average(self, num_tokens: int) -> float:
        """Tokens of an image on average over the layers, not above the N' that are there."""
        ratio = self.keep_ratio
        if ratio is not None:
            ratio = min(1.0, ratio / self.share_before)
        return average_kept(num_tokens, self.num_keep, ratio, self.max_keep)


def later_settings(
    whole: Pruner,
    stages: StagePairs | None,
    share_before: Callable[[float], float],
) -> dict[str, Any]:
    """Budget of a later half: that of the method, or explicit stages.

    Args:
        whole: the method.
        stages: `((layer, K), ...)`, or None.
        share_before: budget as a share -> share that the first half leaves.

    Raises:
        ValueError: if the first stage is to keep more than the first half leaves.
    """
    if stages is not None:
        layer, kept = check_stages(stages)[0]
        if isinstance(kept, int) and whole.num_keep is not None and kept > whole.num_keep:
            raise ValueError(
                f"stages={stages!r} keep {kept} before layer {layer}, but {whole.name} leaves"
                f" num_keep={whole.num_keep} before the language model; pass K that do not grow."
            )
        return {"stages": stages}
    ratio = whole.keep_ratio
    before = 1.0 if ratio is None else min(1.0, share_before(ratio))
    return {**{name: getattr(whole, name) for name in BUDGETS}, "share_before": before}


def needs_of(parts: Sequence[Pruner]) -> Needs:
    """What all halves together read of the tower."""
    return reduce(or_, (part.tower_needs for part in parts))


def inside(pruner: Pruner, tokens: VisualTokens) -> tuple[LayerTokens, VisualTokens]:
    """The tokens inside the language model, and what the tower says of them.

    Raises:
        ValueError: if they are other tokens.
    """
    if not isinstance(tokens, LayerTokens) or tokens.tower is None:
        raise ValueError(
            f"{pruner.name} looks up inside the language model what the vision tower said; give it"
            " LayerTokens with `tower`, or pass it through a host."
        )
    return tokens, tokens.tower


def tower_places(tokens: LayerTokens) -> Tensor:
    """[I, N'] which token of the tower each is; separators are looked up as the token before."""
    column = torch.arange(tokens.num_tokens, device=tokens.places.device)
    known = torch.where(tokens.places >= 0, column, 0).cummax(dim=1).values
    return take(tokens.places, known).clamp(min=0)


def of_tower(tokens: LayerTokens, values: Tensor) -> Tensor:
    """What the tower says of all its tokens, [I, N] or [I, N, D], of the N' that are there."""
    return take(values, tower_places(tokens).to(values.device)).to(tokens.features.device)
