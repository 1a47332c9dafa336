from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ocvtp.ops.selection import top_k
from ocvtp.pruners.base import NamedSettings, Status
from ocvtp.pruners.layer_pruner import LayerNeeds, OneStagePruner
from ocvtp.pruners.registry import register
from ocvtp.structures import Selection, VisualTokens

_LEFT = {192: (166, 152), 128: (98, 82), 64: (30, 11)}
"""By the average over 32 layers, of 576: what stays before layer 2, or before layer 3."""


@register("fastv")
@dataclass(kw_only=True, eq=False)
class FastV(OneStagePruner):
    """FastV: after an early layer keep the tokens that the prompt's last token attends to most.

    Paper: https://arxiv.org/abs/2403.06764, section 4.

    Args:
        num_keep: tokens kept per image, on average over the layers: of 576 in 32 layers 192, 128
            and 64 are 166, 98 and 30 after layer 2, also as `setting="paper-192"` etc.; as
            `layer3-192` etc. they are 152, 82 and 11 after layer 3. None, or
            `setting="paper"`, for the paper's half of them after layer 2.
        layer: before which tokens are dropped; paper: 2.
        stages: `((layer, K),)` in place of an average.
    Deviations: none. Tokens keep their positions.
    """

    title: ClassVar[str] = (
        "FastV: after an early layer keep the tokens that the prompt's last token attends to most."
    )
    reads: ClassVar[str] = "attention (last token)"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2403.06764"
    published: ClassVar[bool] = True
    named_settings: ClassVar[NamedSettings] = {
        "paper": {},
        **{f"paper-{n}": {"stages": ((2, left[0]),)} for n, left in _LEFT.items()},
        **{f"layer3-{n}": {"stages": ((3, left[1]),)} for n, left in _LEFT.items()},
    }
    paper_share: ClassVar[float | None] = 0.5

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds(attention=((layer - 1, "last"),))

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        return top_k(tokens.attention[layer - 1, "last"], num_keep, tokens.valid)
