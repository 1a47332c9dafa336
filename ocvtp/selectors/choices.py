"""How K tokens are chosen by their scores: the best, or the best that do not repeat each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.ops.diversity import spread_from
from ocvtp.ops.ridge import greedy_ridge
from ocvtp.ops.selection import ascending, descending, top_k
from ocvtp.ops.similarity import Cosines, full
from ocvtp.slots.statistics import standardized
from ocvtp.structures import Selection, VisualTokens

_TINY = torch.finfo(torch.float32).tiny
_LAST = -1e30  # below any candidate, above what is taken


@dataclass(frozen=True)
class Choice(ABC):
    """Turns scores and a budget into the tokens that are kept."""

    name: ClassVar[str]

    @abstractmethod
    def select(self, scores: Tensor, tokens: VisualTokens, num_keep: int) -> Selection:
        """Keep K tokens of every image.

        Images are chosen from apart; ties go to the lower number, and padding comes last.

        Args:
            scores: [B, N], finite.
            tokens: whose `valid` says what is padding; some choices compare their `projected`, or
                their `features` where these are not there.
            num_keep: K, 1 <= K <= N.

        Returns:
            [B, K] ascending.
        """

    def describe(self) -> str | dict[str, float]:
        """What `parse_choice` makes it of."""
        return self.name


@dataclass(frozen=True)
class TopK(Choice):
    """The K best; those of a smaller budget are among those of a larger one."""

    name: ClassVar[str] = "topk"

    def select(self, scores: Tensor, tokens: VisualTokens, num_keep: int) -> Selection:
        return top_k(scores, num_keep, tokens.valid)


@dataclass(frozen=True)
class _Shared(Choice):
    share: float = 0.5

    def describe(self) -> dict[str, float]:
        return {self.name: self.share}


@dataclass(frozen=True)
class MMR(_Shared):
    """One by one the token of the most `share s - (1 - share) cos`, at first the best.

    Maximal marginal relevance (https://doi.org/10.1145/290941.291025) as IDPruner chooses by a
    trained scorer: `s` is the score, from 0 to 1 over the image; `cos` the largest cosine to a
    token that is taken. Those of a smaller budget are among those of a larger one.

    Args:
        share: of the score, 0 to 1.
    """

    name: ClassVar[str] = "mmr"

    def select(self, scores: Tensor, tokens: VisualTokens, num_keep: int) -> Selection:
        real = tokens.real
        low = scores.masked_fill(~real, float("inf")).amin(dim=1, keepdim=True)
        high = scores.masked_fill(~real, float("-inf")).amax(dim=1, keepdim=True)
        score = (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
        left = score.masked_fill(~real, _LAST)  # of those that are not taken
        nearest = torch.full_like(score, -1.0)
        cosines = Cosines(_compared(tokens), num_keep)
        value, picks = left, []
        for step in range(num_keep):
            pick = value.argmax(dim=1, keepdim=True)  # [B, 1]
            picks.append(pick)
            if step + 1 < num_keep:
                left = left.scatter(1, pick, float("-inf"))
                nearest = nearest.maximum(cosines(pick[:, 0]).to(nearest.dtype))
                value = torch.where(
                    left > _LAST, self.share * score - (1 - self.share) * nearest, left
                )
        return ascending(torch.cat(picks, dim=1), tokens.valid, tokens.num_tokens)


@dataclass(frozen=True)
class MaxMin(_Shared):
    """A share of the K by score, at least one; then always the token that is least like these.

    Args:
        share: chosen by score, 0 to 1.
    """

    name: ClassVar[str] = "maxmin"

    def select(self, scores: Tensor, tokens: VisualTokens, num_keep: int) -> Selection:
        best = descending(scores, tokens.valid)[:, : max(1, round(self.share * num_keep))]
        if (more := num_keep - best.shape[1]) > 0:
            cosines = Cosines(_compared(tokens), more)
            # The largest cosine to those that are there; where padding is, all real tokens are.
            far = spread_from(cosines, cosines.nearest_of(best), best, more, tokens.valid)
            best = torch.cat([best, far], dim=1)
        return ascending(best, tokens.valid, tokens.num_tokens)


@dataclass(frozen=True)
class Restore(_Shared):
    """One by one the token that restores the most of what scores say matters; ours.

    Tokens weigh `sigmoid(s) + share`, and are taken by `ocvtp.ops.ridge.greedy_ridge`, which is the
    pruner `ridge` with these weights. For scores that are log-odds, as those of the loss `mask`.

    Args:
        share: what every token weighs besides, 0 to 1, so that where no score is high the whole
            image counts.
    """

    share: float = 0.003
    name: ClassVar[str] = "restore"

    def select(self, scores: Tensor, tokens: VisualTokens, num_keep: int) -> Selection:
        targets = standardized(full(tokens.features), tokens.valid)
        weights = (full(scores).sigmoid() + self.share) * tokens.real
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=_TINY)
        picks = greedy_ridge(targets, weights.to(targets), num_keep, valid=tokens.valid)
        return ascending(picks, tokens.valid, tokens.num_tokens)


CHOICES: dict[str, type[Choice]] = {cls.name: cls for cls in (TopK, MMR, MaxMin, Restore)}


def parse_choice(value: Any) -> Choice:
    """The choice that settings name.

    Args:
        value: a name, or a mapping of one name to its share: `topk`, `{"mmr": 0.5}`,
            `{"maxmin": 0.5}`, `{"restore": 0.003}`; these shares are the defaults. A `Choice` stays
            as it is.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, Choice):
        return value
    name, share = value, None
    if isinstance(value, Mapping) and len(value) == 1:
        [(name, share)] = value.items()
    is_known = isinstance(name, str) and name in CHOICES
    if is_known and share is None:
        return CHOICES[name]()
    is_share = isinstance(share, Real) and not isinstance(share, bool) and 0 <= float(share) <= 1
    if not (is_known and is_share and issubclass(CHOICES[name], _Shared)):
        raise ValueError(
            f"choice={value!r}; pass 'topk', or 'mmr', 'maxmin' or 'restore', alone or with a share"
            " from 0 to 1 as in {'mmr': 0.5}."
        )
    return CHOICES[name](float(share))  # type: ignore[call-arg, arg-type]


def _compared(tokens: VisualTokens) -> Tensor:
    """[B, N, D'], zeros on padding."""
    values = tokens.features if tokens.projected is None else tokens.projected
    if tokens.valid is not None:
        values = values.masked_fill(~tokens.valid[:, :, None], 0.0)
    return values
