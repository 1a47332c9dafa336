from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ocvtp.ops.merging import keep_all
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Selection, VisualTokens


@register("none")
@dataclass(kw_only=True, eq=False)
class NoPruning(Pruner):
    """None: keep every token, the yardstick of every table.

    Paper: none.

    Args:
        num_keep: accepted, so that sweeps can name it beside the others; has no effect.
    Deviations: none.
    """

    title: ClassVar[str] = "None: keep every token, the yardstick of every table."
    reads: ClassVar[str] = "-"
    status: ClassVar[Status] = "control"

    def __post_init__(self) -> None:
        self._check_numbers()

    @property
    def fixed_by(self) -> str | None:
        return "keeps every token"

    def budget(self, num_tokens: int) -> int:
        return num_tokens

    def exceeds(self, num_tokens: int) -> bool:
        return False

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        return keep_all(tokens)
