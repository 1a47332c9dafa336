"""FastV.

I images, N visual tokens, K kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ocvtp.pruners.base import Status
from ocvtp.pruners.layered import LayerNeeds, LayerPruner, LayerStage, to_average
from ocvtp.pruners.registry import register
from ocvtp.pruners.selection import top_k
from ocvtp.structures import Selection, VisualTokens


@register("fastv")
@dataclass(kw_only=True, eq=False)
class FastV(LayerPruner):
    """FastV: behind an early layer keep the tokens that the prompt's last token attends to most.

    Paper: https://arxiv.org/abs/2403.06764, section 4.
    Stage: llm_layers.  Needs: attention (last token).  Deterministic: yes.

    Args:
        num_keep: tokens kept per image, on average over the layers: of 576 in 32 layers 192, 128
            and 64 are 166, 98 and 30 behind layer 2. None for the paper's half of them there.
        layer: in front of which tokens are dropped; paper: 2.
        stages: `((layer, K),)` in place of an average.
    Deviations: none. Tokens keep their positions.
    """

    layer: int = 2

    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2403.06764"
    published: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None and len(self.stages) != 1:
            raise ValueError(
                f"stages={self.stages!r}; FastV drops tokens once: pass ((layer, K),)."
            )

    def needs_at(self, layer: int) -> LayerNeeds:
        """The last row of the layer before."""
        return LayerNeeds(attention=((layer - 1, "last"),))

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        if self.num_keep is None and self.keep_ratio is None:
            return (LayerStage(self.layer, max(1, round(num_tokens / 2))),)
        average = self._average(num_tokens)
        return to_average((self.layer,), (1.0,), num_layers, num_tokens, average)

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        return top_k(tokens.attention[layer - 1, "last"], num_keep, tokens.valid)
