"""What methods of two halves do inside the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ocvtp.ops.clustering import density_peaks, keep_in_clusters
from ocvtp.ops.merging import contextual_share, dominant_and_contextual, head_mean, keep_all
from ocvtp.ops.selection import top_k
from ocvtp.pruners.base import Status
from ocvtp.pruners.layer_pruner import LayerNeeds, LayerStage, to_average
from ocvtp.pruners.two_stage import LaterHalf, inside, of_tower
from ocvtp.structures import Needs, Selection, VisualTokens

_KEPT = (35, 26, 19)
_CONTEXTUAL = 0.135  # of 35, 26 and 19: 5, 4 and 3


@dataclass(kw_only=True, eq=False)
class VisionDropLater(LaterHalf):
    """Dominant and contextual tokens again, see `VisionDrop`."""

    name: ClassVar[str] = "visiondrop"
    status: ClassVar[Status] = "official"
    merging: ClassVar[bool] = True
    positions: ClassVar[Literal["contiguous", "original"]] = "contiguous"

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds(attention=((layer - 1, "visual"),), keys=(layer - 1,))

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return num_layers // 4, num_layers // 2, 3 * num_layers // 4

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        average = self._average(num_tokens)
        return to_average(self._layers(num_layers), _KEPT, num_layers, num_tokens, average)

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        if num_keep == tokens.num_tokens:
            return keep_all(tokens)
        contextual = contextual_share(None, _CONTEXTUAL, num_keep, num_keep)
        return dominant_and_contextual(
            tokens.attention[layer - 1, "visual"],
            head_mean(tokens.keys[layer - 1], tokens.num_heads),
            num_dominant=num_keep - contextual,
            num_contextual=contextual,
            with_cls=False,
            valid=None,
        )


@dataclass(kw_only=True, eq=False)
class ViTCoPLater(LaterHalf):
    """Clusters first, then the shortest keys, see `ViTCoP`."""

    block: int
    cluster_share: float | None

    name: ClassVar[str] = "vitcop"
    status: ClassVar[Status] = "unofficial"
    merging: ClassVar[bool] = True

    @property
    def tower_needs(self) -> Needs:
        return Needs(keys=(self.block,))

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds(keys=(layer - 1,))

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return 2, max(3, 22 * num_layers // 32)

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        average = self._average(num_tokens)
        return to_average(self._layers(num_layers), (5, 1), num_layers, num_tokens, average)

    def _num_clusters(self, num_tokens: int) -> int:
        share, budget = self.cluster_share, self.keep_ratio
        if share is None and self.num_keep is not None:  # N is .2 of all and .9 K
            budget = self.num_keep / max(num_tokens, 5 * num_tokens - 4.5 * self.num_keep)
        if share is None:
            share = 0.15 if budget is None else 0.09 + 0.27 * min(1.0, budget)
        return max(1, int(share * num_tokens))

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        if num_keep == tokens.num_tokens:
            return keep_all(tokens)
        lengths = head_mean(tokens.keys[layer - 1], tokens.num_heads).norm(dim=2)
        if layer != self._first_layer:
            return top_k(-lengths, num_keep)
        here, tower = inside(self, tokens)
        points = head_mean(of_tower(here, tower.keys[self.block]), tower.num_heads)
        count = self._num_clusters(tokens.num_tokens)
        return keep_in_clusters(density_peaks(points, count)[0], count, lengths, num_keep)


@dataclass(kw_only=True, eq=False)
class VFlowOptLater(LaterHalf):
    """The importance that the tower gave, again, see `VFlowOpt`."""

    block: int

    name: ClassVar[str] = "vflowopt"
    status: ClassVar[Status] = "unofficial"

    @property
    def tower_needs(self) -> Needs:
        return Needs(attention=((self.block, "global"),))

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds()

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return round(9 * num_layers / 28), round(18 * num_layers / 28)

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        average = self._average(num_tokens)
        return to_average(self._layers(num_layers), (2, 1), num_layers, num_tokens, average)

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        here, tower = inside(self, tokens)
        return top_k(of_tower(here, tower.attention[self.block, "global"]), num_keep)
