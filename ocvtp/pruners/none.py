"""The unpruned control.

B images, N visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.pruners.selection import ascending
from ocvtp.structures import Selection, VisualTokens


@register("none")
@dataclass(kw_only=True, eq=False)
class NoPruning(Pruner):
    """None: keep every token, the yardstick of every table.

    Paper: none.
    Stage: llm_input.  Needs: -.  Deterministic: yes.

    Args:
        num_keep: accepted, so that sweeps can name it beside the others; has no effect.
    Deviations: none.
    """

    status: ClassVar[Status] = "control"

    def __post_init__(self) -> None:
        """Any budget will do."""

    def budget(self, num_tokens: int) -> int:
        """N."""
        return num_tokens

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        indices = torch.arange(num_keep, device=tokens.features.device)
        return ascending(indices.repeat(tokens.batch_size, 1), tokens.valid, num_keep)
