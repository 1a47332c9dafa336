from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ocvtp.ops.selection import top_k
from ocvtp.pruners.base import NamedSettings, Status
from ocvtp.pruners.layer_pruner import LayerNeeds, LayerPruner, LayerStage, to_average
from ocvtp.pruners.registry import register
from ocvtp.structures import Selection, VisualTokens

_SHARES = (0.5, 0.25, 0.125)


@register("pyramiddrop")
@dataclass(kw_only=True, eq=False)
class PyramidDrop(LayerPruner):
    """PyramidDrop: at each quarter of the layers keep half of what the last token attends to most.

    Paper: https://arxiv.org/abs/2410.17247, section 3.2.

    The scores are those of the layer that comes: its norm, projections and positions, the prompt's
    last token against everything that is still there.

    Args:
        num_keep: tokens kept per image, on average over the layers; then 4 : 2 : 1 before
            layers L/4, L/2 and 3L/4, if there are so many: the first L/4 layers alone
            make N/4. None, or `setting="paper"`, for the paper's int(.5 N), int(.25 N) and
            int(.125 N).
        stages: `((layer, K), ...)` in place of an average.
    Deviations: none. What stays is numbered again at every stage.
    """

    title: ClassVar[str] = (
        "PyramidDrop: at each quarter of the layers keep half of what the last token attends to"
        " most."
    )
    reads: ClassVar[str] = "attention (last token, coming layer)"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2410.17247"
    published: ClassVar[bool] = True
    named_settings: ClassVar[NamedSettings] = {"paper": {}}
    settings_note: ClassVar[str] = (
        "The paper's table of 192, 128 and 64 tokens on average does not say before which layers"
        " how many stay. For 64 its author names, as an example, 19% of the tokens before layer 2,"
        " 19% of these before layer 8 and again before layer 16: pass"
        " stages=((2, 109), (8, 20), (16, 3))"
        " (https://github.com/Cooperx521/PyramidDrop/issues/29)."
    )
    positions: ClassVar[Literal["contiguous", "original"]] = "contiguous"

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds(attention=((layer, "last"),))

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return num_layers // 4, num_layers // 2, 3 * num_layers // 4

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        layers = self._layers(num_layers)
        if not self.has_budget:
            counts = (max(1, int(num_tokens * share)) for share in _SHARES)
            return tuple(map(LayerStage, layers, counts))
        average = self._average(num_tokens)
        return to_average(layers, _SHARES, num_layers, num_tokens, average)

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        return top_k(tokens.attention[layer, "last"], num_keep, tokens.valid)
