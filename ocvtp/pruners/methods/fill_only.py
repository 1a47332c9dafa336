from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ocvtp.ops.selection import top_k
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("fill_only")
@dataclass(kw_only=True, eq=False)
class FillOnly(Pruner):
    """Fill-only: keep the K tokens that receive the most attention, a control for the OC-pruner.

    Paper: none.

    The OC-pruner fills up with these where slots share a token; what its slots are worth is what it
    gains over them.

    Args:
        num_keep: tokens kept per image.
        block: block of the tower whose attention is read; OC-VTP: the selected one.
    Deviations: none.
    """

    block: int = -2

    title: ClassVar[str] = (
        "Fill-only: keep the K tokens that receive the most attention, a control for the OC-pruner."
    )
    reads: ClassVar[str] = "attention (received)"
    status: ClassVar[Status] = "control"

    @property
    def needs(self) -> Needs:
        return Needs(attention=((self.block, "received"),))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        return top_k(tokens.attention[self.block, "received"], num_keep, tokens.valid)
