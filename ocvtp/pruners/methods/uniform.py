from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ocvtp.ops.selection import spaced
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Selection, VisualTokens


@register("uniform")
@dataclass(kw_only=True, eq=False)
class Uniform(Pruner):
    """Uniform: keep tokens at equal steps in raster order, index floor((i + 1/2) N / K).

    Paper: none.

    Args:
        num_keep: tokens kept per image.
    Deviations: none.
    """

    title: ClassVar[str] = (
        "Uniform: keep tokens at equal steps in raster order, index floor((i + 1/2) N / K)."
    )
    reads: ClassVar[str] = "-"
    status: ClassVar[Status] = "control"

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        indices, valid = spaced(tokens.real, num_keep)
        return Selection(indices, None if tokens.valid is None else valid)
