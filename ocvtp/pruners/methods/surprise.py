from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ocvtp.lazy import LazyFact
from ocvtp.ops.cover import greedy_cover, likeness
from ocvtp.ops.selection import ascending
from ocvtp.ops.similarity import full, unit
from ocvtp.pruners.base import Status
from ocvtp.pruners.registry import register
from ocvtp.pruners.trainable import TrainablePruner
from ocvtp.slots.statistics import relative_log, standardized
from ocvtp.structures import AttentionKey, AttentionKind, Needs, Selection, VisualTokens

if TYPE_CHECKING:
    from ocvtp.surprise.network import SurpriseNetwork


@register("surprise")
@dataclass(kw_only=True, eq=False)
class Surprise(TrainablePruner["SurpriseNetwork"]):
    """Surprise: cover what the CLS attends to and what a token's surroundings do not foretell.

    Paper: none.

    A network that was trained on images alone foretells each token from those around it; `s` is
    the logarithm of its error, `a` that of the CLS attention in one head, both minus their mean
    over the image: in most towers a few heads look for objects, and these are the least even ones.
    Tokens weigh `omega = softmax(attention_power a + surprise_power s)`. Tokens are then taken one
    by one that cover these weights, and that restore all tokens by ridge regression.

    Args:
        num_keep: tokens kept per image.
        checkpoint: folder or hub id of an exported network.
        network: one in memory, instead of `checkpoint`. It moves to the tokens' device.
        attention_power: of the CLS attention; 0 reads none.
        surprise_power: of the surprise.
        block: block of the tower whose CLS attention is read.
        head: `sharpest`, the one whose logarithm varies most in the image; or the `mean` of all.
        balance: of covering (0) and restoring (1), see `ocvtp.ops.cover.greedy_cover`. More of it
            leaves fewer tokens that cannot be restored, and covers fewer small objects.
        likeness_power: of the cosine between standardised tokens, by which one covers another.
        spread: how far a token covers others, as a share of the longer side of the image's grid.
        penalty: of the ridge, a share of the mean squared length of the tokens.
    Deviations: unofficial: our own method, in no paper.
    """

    attention_power: float = 0.65
    surprise_power: float = 3.0
    block: int = -2
    head: Literal["sharpest", "mean"] = "sharpest"
    balance: float = 0.75
    likeness_power: float = 1.5
    spread: float = 1 / 3
    penalty: float = 0.3

    title: ClassVar[str] = (
        "Surprise: cover what the CLS attends to and what a token's surroundings do not foretell."
    )
    reads: ClassVar[str] = "hidden (layer of the network), attention (CLS)"
    status: ClassVar[Status] = "unofficial"
    network_class = LazyFact("ocvtp.surprise.network.SurpriseNetwork")
    objective_class = LazyFact("ocvtp.surprise.network.SurpriseObjective")

    def __post_init__(self) -> None:
        super().__post_init__()
        powers = (self.attention_power, self.surprise_power)
        if min(powers) < 0 or not 0 <= self.balance <= 1:
            raise ValueError(
                f"attention_power={powers[0]}, surprise_power={powers[1]}, balance={self.balance};"
                " pass powers of at least 0 and a balance of 0 to 1."
            )
        if self.head not in ("sharpest", "mean"):
            raise ValueError(f"head={self.head!r}; pass sharpest or mean.")
        if not min(self.likeness_power, self.spread, self.penalty) > 0:
            raise ValueError(
                f"likeness_power={self.likeness_power}, spread={self.spread},"
                f" penalty={self.penalty}; pass numbers above 0."
            )

    @property
    def needs(self) -> Needs:
        return Needs(hidden=(self.trained.config.layer,), attention=self._attention)

    @property
    def _attention(self) -> tuple[AttentionKey, ...]:
        kind: AttentionKind = "cls_sharpest" if self.head == "sharpest" else "cls"
        return ((self.block, kind),) if self.attention_power else ()

    @torch.no_grad()
    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        targets = standardized(full(tokens.features), tokens.valid)
        grid, longer = self._grid(tokens), None
        if tokens.valid is not None:
            _, (height, width) = self._filled(tokens)
            longer = height.maximum(width)
        alike = likeness(unit(targets), grid, self.likeness_power, self.spread, longer)
        weights = self._weights(tokens).to(targets.dtype)
        picks = greedy_cover(
            alike, weights, targets, num_keep, self.balance, self.penalty, tokens.valid
        )
        return ascending(picks, tokens.valid, tokens.num_tokens)

    def _weights(self, tokens: VisualTokens) -> Tensor:
        """[B, N], 0 on padding; sums to 1."""
        network: SurpriseNetwork = self.ready(tokens)
        logits = self.surprise_power * network.surprise(tokens)
        for key in self._attention:
            logits = logits + self.attention_power * relative_log(
                tokens.attention[key], tokens.valid
            )
        if tokens.valid is not None:
            logits = logits.masked_fill(~tokens.valid, float("-inf"))
        return logits.softmax(dim=1)
