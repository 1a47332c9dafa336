"""Pruners around a trained scorer: what those of all stages have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ocvtp.lazy import LazyFact
from ocvtp.pruners.trainable import TrainablePruner
from ocvtp.pruners.two_stage import of_tower
from ocvtp.structures import LayerTokens, Needs, VisualTokens

if TYPE_CHECKING:
    from ocvtp.selectors.choices import Choice
    from ocvtp.selectors.network import SelectorNetwork
    from ocvtp.selectors.scorer import Scorer, Scores

_KINDS = ("last", "last_heads", "text", "visual")
_LAYER = 2
"""Of the language model, before which tokens are dropped where no network says another."""


@dataclass(kw_only=True, eq=False)
class SelectorPruner(TrainablePruner["SelectorNetwork"]):
    """A trained scorer, and a choice by its scores.

    Args:
        choice: how tokens are chosen, see `ocvtp.selectors.choices.parse_choice`; None for the
            network's own.
        threshold: every image keeps the tokens with `sigmoid(score)` above it, at least one.

    Raises:
        ValueError: for an unknown choice, a threshold that none can be, and a network that was
            trained for another stage.
    """

    choice: str | dict[str, Any] | None = None
    threshold: float | None = None

    network_class = LazyFact("ocvtp.selectors.network.SelectorNetwork")

    @classmethod
    def takes(cls, config: Mapping[str, Any]) -> bool:
        return super().takes(config) and config.get("stage") == cls.stage

    @classmethod
    def usual_config(cls, tokens: VisualTokens, layer: int) -> Any:
        assert tokens.projected is not None
        config = cls.network_class.default_config(tokens.features.shape[2], layer)
        widths = replace(config.widths, projected=tokens.projected.shape[2])
        before = _LAYER if cls.stage == "llm_layers" else None
        return replace(config, widths=widths, stage=cls.stage, layer=before)

    def __post_init__(self) -> None:
        self._check_threshold()
        super().__post_init__()
        config = self.trained.config
        if config.stage != self.stage:
            other = {"llm_input": "learned", "llm_layers": "learned_layers"}[config.stage]
            where = "" if config.layer is None else f" before layer {config.layer}"
            raise ValueError(
                f"pruner {self.name!r} acts at stage {self.stage}, and the network of"
                f" {self.checkpoint or 'this call'} was trained for {config.stage}{where}; build"
                f" {other!r}."
            )
        self._choice  # noqa: B018 - checks it

    @property
    def trained_in(self) -> Mapping[str, Any]:
        return dict(self.trained.config.host)

    @property
    def _choice(self) -> Choice:
        from ocvtp.selectors.choices import parse_choice

        return parse_choice(self.trained.config.choice if self.choice is None else self.choice)

    def _check_threshold(self) -> None:
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(
                f"threshold={self.threshold!r}; pass a number between 0 and 1, which"
                " sigmoid(score) must exceed."
            )

    def _passing(self, scores: Tensor, real: Tensor) -> Tensor:
        """[B, N] the tokens above the threshold, and the best."""
        assert self.threshold is not None
        number = torch.arange(scores.shape[1], device=scores.device)
        best = scores.masked_fill(~real, float("-inf")).argmax(dim=1, keepdim=True)
        passing: Tensor = real & ((scores.sigmoid() > self.threshold) | (number == best))
        return passing

    @torch.no_grad()
    def _scores(self, tokens: VisualTokens, num_keep: int | None) -> Tensor:
        """[B, N], in fp32 whatever the tokens and the caller compute in."""
        with torch.autocast(tokens.features.device.type, enabled=False):
            network: SelectorNetwork = self.ready(tokens)
            scores: Scores = network(tokens, num_keep)
        return scores.values


def check_inside(scorer: Scorer, layer: int) -> Needs:
    """What a scorer before a layer of the language model reads of the vision tower.

    Raises:
        ValueError: if it reads what there is not, there.
    """
    needs, known = scorer.needs, range(max(0, layer - 1), layer + 1)
    within = {(block, kind) for block in known for kind in _KINDS}
    column = needs.column is None or needs.column in known
    if (
        needs.keys
        or needs.cls
        or needs.clip
        or not within.issuperset(needs.attention)
        or not column
    ):
        said = ", ".join(f"{name}={value!r}" for name, value in scorer.sizes().items())
        raise ValueError(
            f"scorer {scorer.name!r} reads what there is not before layer {layer}: its settings are"
            f" {said}, and it may read projected, text, hidden layers of the tower, and attention"
            f" {' or '.join(map(repr, _KINDS))} of layer {' or '.join(map(str, known))}."
        )
    return Needs(hidden=needs.hidden)


def at_layer(tokens: VisualTokens, needs: Needs) -> VisualTokens:
    """The tokens before a layer of the language model as a scorer reads them.

    Args:
        tokens: `LayerTokens`, with `tower` if layers of it are read.
        needs: of the scorer.

    Returns:
        the same with hidden states as `projected`, and with what the tower said of each token in
        `hidden`; on the tower's grid where the tower was read and all its tokens are still there.
    """
    seen = replace(tokens, projected=tokens.features)
    if not needs.hidden:
        return seen
    if not isinstance(tokens, LayerTokens) or tokens.tower is None:
        raise ValueError(
            "this scorer looks up inside the language model what the vision tower said; give it"
            " LayerTokens with `tower`, or pass it through a host."
        )
    tower = tokens.tower
    hidden = {layer: of_tower(tokens, tower.hidden[layer]) for layer in needs.hidden}
    rows, columns = tower.grid_hw
    is_whole = rows * columns == tower.num_tokens == tokens.num_tokens
    return replace(seen, hidden=hidden, grid_hw=tower.grid_hw if is_whole else tokens.grid_hw)
