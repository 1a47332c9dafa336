"""Pruners that drop tokens between the L layers of the language model."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ocvtp.pruners.base import Budget, Pruner
from ocvtp.pruners.budgets import StagePairs, average_kept, check_stages, count_stages
from ocvtp.structures import LayerTokens, Needs, Selection, Stage, VisualTokens

Norm = Literal["final", "layer"]


@dataclass(frozen=True)
class LayerStage:
    """One place where tokens are dropped.

    Args:
        layer: before which; layers are numbered from 0.
        num_keep: K, tokens of an image that stay.
    """

    layer: int
    num_keep: int


@dataclass(frozen=True)
class LayerNeeds:
    """What a pruner reads before a layer besides hidden states.

    Args:
        attention: `(layer, kind)` of `last`, `text` and `visual`; of the layer before, or of the
            coming one, as it would be with all tokens that are still there.
        keys: layers whose keys are read, of visual and of text tokens.
        text: whether the hidden states of the text are read.
        normed: see `LayerTokens.normed`.
        column: a layer up to the coming one, whose attention is read of a column of the pruner's
            own, see `LayerTokens.column`; None for no such column.
    """

    attention: tuple[tuple[int, str], ...] = ()
    keys: tuple[int, ...] = ()
    text: bool = False
    normed: tuple[Norm, ...] = ()
    column: int | None = None


@dataclass(kw_only=True, eq=False)
class LayerPruner(Pruner):
    """A pruner of stage `llm_layers`.

    Its budget is an average: `num_keep` tokens of an image over all layers of the language model,
    whose first layers read all of them. A subclass implements `schedule` (how many stay where),
    `needs_at` and `_select_at`.

    Args:
        num_keep: tokens kept per image, on average over the layers.
        keep_ratio: the same as a share of the tokens that the language model reads.
        max_keep: the most tokens of an image on average; alone, or as a cap on `keep_ratio`.
        stages: `(layer, K)` pairs that replace the method's own schedule: before which layer
            how many tokens stay. An int is their number, at most; a float, up to 1.0, their share
            of the image's tokens. No stage may keep more than the one before.
    """

    stages: StagePairs | None = None

    stage: ClassVar[Stage] = "llm_layers"
    budgets: ClassVar[tuple[Budget, ...]] = ("average",)
    published: ClassVar[bool] = False
    """True if the paper's own schedule holds where there is neither a budget nor `stages`."""

    def __post_init__(self) -> None:
        if self.stages is not None:
            self._check_stages()
        elif self.has_budget or not self.published:
            self._check_budget()

    @abstractmethod
    def _layers(self, num_layers: int) -> tuple[int, ...]:
        """The method's own layers, when `stages` does not name them."""

    @abstractmethod
    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        """How many tokens stay where, when `stages` does not say it."""

    @abstractmethod
    def needs_at(self, layer: int) -> LayerNeeds:
        """What is read before a layer."""

    @abstractmethod
    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        """The method itself, before a layer; `num_keep` is K, 1 <= K <= N."""

    def raters(self, tokens: LayerTokens) -> Tensor | None:
        """[I, M] bool, the text tokens whose rows `text` attention is the mean of.

        Args:
            tokens: before layer 0, i.e. embeddings.
        """
        del tokens
        return None

    def schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        """How many tokens of an image stay before which layer, for N tokens and L layers.

        Raises:
            ValueError: if the budget cannot be met, or a share is of more than is left.
        """
        if self.stages is None:
            return self._schedule(num_layers, num_tokens)
        stages = count_stages(check_stages(self.stages), num_tokens)
        return tuple(LayerStage(*stage) for stage in stages)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Before which of L layers tokens are dropped, ascending.

        Raises:
            ValueError: if the model has no such layers.
        """
        if self.stages is None:
            layers = self._layers(num_layers)
        else:
            layers = tuple(int(layer) for layer, _ in self.stages)
        if not all(1 <= layer < num_layers for layer in layers):
            raise ValueError(
                f"{self.name} drops tokens before layers {', '.join(map(str, layers))}, but"
                f" the language model has {num_layers}; pass stages=((layer, K), ...) with layers 1"
                f" to {num_layers - 1}."
            )
        return layers

    def needs_by_layer(self, num_layers: int) -> list[tuple[int, LayerNeeds]]:
        """Before which of L layers tokens are dropped, and what is read there.

        Raises:
            ValueError: if the model has no such layers.
        """
        return [(layer, self.needs_at(layer)) for layer in self.layers(num_layers)]

    @property
    def positions(self) -> Literal["contiguous", "original"]:
        """Whether tokens are numbered again when some are dropped."""
        return "original"

    @property
    def tower_needs(self) -> Needs:
        return Needs()

    @property
    def needs(self) -> Needs:
        """Attention and keys of the language model that the first choice reads."""
        first = self.needs_at(self._first_layer)
        return Needs(attention=first.attention, keys=first.keys, text=first.text)  # type: ignore[arg-type]

    @property
    def _first_layer(self) -> int:
        return self._layers(32)[0] if self.stages is None else int(self.stages[0][0])

    def select_at(self, tokens: LayerTokens, layer: int, num_keep: int) -> Selection:
        """Choose the tokens that stay before a layer.

        Args:
            tokens: with everything that `needs_at(layer)` names.
            layer: one of `schedule`.
            num_keep: K of it.
        """
        return self._select_at(tokens, layer, min(num_keep, tokens.num_tokens))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        return self._select_at(tokens, self._first_layer, num_keep)

    def budget(self, num_tokens: int) -> int:
        """K of the first choice, where that is what `select` is asked for."""
        if not self.has_budget:
            return self.schedule(32, num_tokens)[0].num_keep
        return super().budget(num_tokens)

    def _average(self, num_tokens: int) -> float:
        """Tokens of an image on average over the layers; at most N."""
        return average_kept(num_tokens, self.num_keep, self.keep_ratio, self.max_keep)

    def _check_unpadded(self, tokens: VisualTokens) -> None:
        if tokens.valid is not None:
            raise ValueError(
                f"{self.name} cannot read padded images; give it images of equally many tokens at a"
                " time, without `valid`."
            )

    def _check_stages(self) -> None:
        assert self.stages is not None
        if self.has_budget:
            raise ValueError(
                f"{self.name} got stages and a budget; pass stages, or one of num_keep, keep_ratio"
                " and max_keep."
            )
        check_stages(self.stages)


@dataclass(kw_only=True, eq=False)
class OneStagePruner(LayerPruner):
    """A pruner that drops tokens before one layer.

    Args:
        layer: before which.
    """

    layer: int = 2

    paper_share: ClassVar[float | None] = None
    """The share of tokens that stays there where there is no budget; None if there must be one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None and len(self.stages) != 1:
            raise ValueError(
                f"stages={self.stages!r}; {self.name} drops tokens once: pass stages=((layer, K),)."
            )

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        if not self.has_budget:
            assert self.paper_share is not None
            return (LayerStage(self.layer, max(1, round(num_tokens * self.paper_share))),)
        average = self._average(num_tokens)
        return to_average((self.layer,), (1.0,), num_layers, num_tokens, average)


def to_average(
    layers: Sequence[int], shares: Sequence[float], num_layers: int, num_tokens: int, average: float
) -> tuple[LayerStage, ...]:
    """Counts in proportion to `shares` that come to an average over all layers.

    Args:
        layers: before which tokens are dropped. shares: how much stays there, in proportion.
        num_layers: L. num_tokens: N, which the layers before the first stage read.
        average: over the L layers.

    Raises:
        ValueError: if the first layers alone read more than that.
    """
    if average >= num_tokens:
        return tuple(LayerStage(layer, num_tokens) for layer in layers)
    ends = [*layers[1:], num_layers]
    lengths = [end - start for start, end in zip(layers, ends, strict=True)]
    left = num_layers * average - layers[0] * num_tokens
    free = set(range(len(layers)))
    counts = [float(num_tokens)] * len(layers)
    while free:  # a stage cannot keep more than there are: the others get what it leaves
        scale = left / sum(lengths[i] * shares[i] for i in free)
        full = {i for i in free if scale * shares[i] > num_tokens}
        if not full:
            counts = [scale * shares[i] if i in free else c for i, c in enumerate(counts)]
            break
        free -= full
        left -= num_tokens * sum(lengths[i] for i in full)
    if min(counts) < 0.5:
        least = (layers[0] * num_tokens + num_layers - layers[0]) / num_layers
        raise ValueError(
            f"an average of {average:g} tokens cannot be had: the first {layers[0]} of"
            f" {num_layers} layers read all {num_tokens}. Pass num_keep={math.ceil(least)} or more,"
            " drop tokens before an earlier layer, or compose it with a pruner that acts"
            " before the language model."
        )
    return tuple(
        LayerStage(layer, max(1, round(c))) for layer, c in zip(layers, counts, strict=True)
    )
