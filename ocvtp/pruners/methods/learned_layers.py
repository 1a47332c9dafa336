from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from ocvtp.pruners.base import Budget, Status
from ocvtp.pruners.layer_pruner import LayerNeeds, LayerStage, OneStagePruner
from ocvtp.pruners.registry import register
from ocvtp.pruners.selector_pruner import SelectorPruner, at_layer, check_inside
from ocvtp.structures import Needs, Selection, VisualTokens


@register("learned_layers")
@dataclass(kw_only=True, eq=False)
class LearnedLayers(SelectorPruner, OneStagePruner):
    """Learned inside the language model: a scorer chooses among the tokens before a layer.

    Paper: none; recipes after several, see the documentation on training.

    The layer is that which the network was trained for. Scorers read hidden states in place of
    projected tokens there, and may read attention of the layer before and the tower's tokens.

    Args:
        num_keep: tokens kept per image, on average over the layers; with a threshold the most.
        checkpoint: folder or hub id of an exported scorer.
        network: one in memory, instead of `checkpoint`. It moves to the tokens' device.
        choice: `topk`, `restore`, `{"mmr": SHARE}` or `{"maxmin": SHARE}`; None for the network's.
        stages: `((layer, K),)` in place of an average.
        threshold: every image keeps the tokens with `sigmoid(score)` above it, at least one; then
            no budget is needed.
    Deviations: unofficial: scorers and recipes are ours, after descriptions of others'.
    """

    layer: int = field(init=False, default=0)

    title: ClassVar[str] = (
        "Learned inside the language model: a scorer chooses among the tokens before a layer."
    )
    reads: ClassVar[str] = "hidden states, and what the scorer reads: text, attention"
    status: ClassVar[Status] = "unofficial"
    budgets: ClassVar[tuple[Budget, ...]] = ("average", "adaptive")

    def __post_init__(self) -> None:
        super().__post_init__()
        layer = self.trained.config.layer
        assert layer is not None, "see SelectorConfig"
        self.layer = layer
        if self.stages is not None and self.stages[0][0] != layer:
            raise ValueError(
                f"stages={self.stages!r}, and this network was trained to drop tokens before layer"
                f" {layer}; pass (({layer}, K),)."
            )
        check_inside(self.trained.scorer, layer)

    @property
    def exact(self) -> bool:
        return self.threshold is None

    def _check_budget(self) -> None:
        if self.exact or self.has_budget:
            super()._check_budget()

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        if not self.has_budget:  # as the threshold says
            return (LayerStage(self.layer, num_tokens),)
        return super()._schedule(num_layers, num_tokens)

    @property
    def positions(self) -> Literal["contiguous", "original"]:
        return self.trained.config.positions

    @property
    def tower_needs(self) -> Needs:
        return Needs(hidden=self.trained.scorer.needs.hidden)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Before which of L layers tokens are dropped.

        Raises:
            ValueError: if the network was trained in a model of other layers.
        """
        trained = self.trained.config.host.get("num_layers")
        if trained is not None and trained != num_layers:
            raise ValueError(
                f"this selector was trained in a language model of {trained} layers, and this one"
                f" has {num_layers}; pass a checkpoint that was trained in this model."
            )
        return super().layers(num_layers)

    def needs_at(self, layer: int) -> LayerNeeds:
        needs = self.trained.scorer.needs
        return LayerNeeds(attention=needs.attention, text=needs.text, column=needs.column)

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        seen = at_layer(tokens, self.trained.scorer.needs)
        scores = self._scores(seen, num_keep)
        if self.threshold is not None:
            seen = replace(seen, valid=self._passing(scores, seen.real))
        return self._choice.select(scores, seen, num_keep)
