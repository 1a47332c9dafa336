from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ocvtp.pruners.base import AdaptivePruner, Status
from ocvtp.pruners.registry import register
from ocvtp.pruners.selector_pruner import SelectorPruner
from ocvtp.structures import Needs, Selection, VisualTokens


@register("learned")
@dataclass(kw_only=True, eq=False)
class Learned(SelectorPruner, AdaptivePruner):
    """Learned: keep the tokens that a scorer, trained for a frozen language model, puts first.

    Paper: none; recipes after several, see the documentation on training.

    Args:
        num_keep: tokens kept per image; with a threshold the most.
        checkpoint: folder or hub id of an exported scorer, or of an OC-pruner, whose tokens then
            score their largest share in a slot.
        network: one in memory, instead of `checkpoint`. It moves to the tokens' device.
        choice: `topk`, `restore`, `{"mmr": SHARE}` or `{"maxmin": SHARE}`; None for the network's.
        threshold: every image keeps the tokens with `sigmoid(score)` above it, at least one; then
            no budget is needed.
        adaptive: whether there is a threshold; 0.5 where none is given.
    Deviations: unofficial: scorers and recipes are ours, after descriptions of others'.
    """

    title: ClassVar[str] = (
        "Learned: keep the tokens that a scorer, trained for a frozen language model, puts first."
    )
    reads: ClassVar[str] = "what the scorer reads: projected, text, hidden"
    status: ClassVar[Status] = "unofficial"

    def __post_init__(self) -> None:
        self._check_threshold()
        if self.threshold is not None:
            self.adaptive = True
        elif self.adaptive:
            self.threshold = 0.5
        if not self.adaptive:
            self._check_budget()
        super().__post_init__()

    @property
    def needs(self) -> Needs:
        return self.trained.scorer.needs

    @property
    def prompt_positions(self) -> Literal["contiguous", "original"]:
        return self.trained.config.positions

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        told = num_keep if self.has_budget else None
        if self.adaptive and self.num_keep is not None:
            told = self.num_keep
        scores = self._scores(tokens, told)
        if self.adaptive:
            tokens = replace(tokens, valid=self._passing(scores, tokens.real))
        return self._choice.select(scores, tokens, num_keep)
