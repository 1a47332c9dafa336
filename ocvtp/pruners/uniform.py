"""The uniform control.

B images, N visual tokens, K kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Selection, VisualTokens


@register("uniform")
@dataclass(kw_only=True, eq=False)
class Uniform(Pruner):
    """Uniform: keep tokens at equal steps in raster order, index floor((i + 1/2) N / K).

    Paper: none.
    Stage: llm_input.  Needs: -.  Deterministic: yes.

    Args:
        num_keep: tokens kept per image.
    Deviations: none.
    """

    status: ClassVar[Status] = "control"

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        batch, num_tokens = tokens.features.shape[:2]
        step = torch.arange(num_keep, device=tokens.features.device)[None]  # [1, K]
        if tokens.valid is None:
            indices = (2 * step + 1) * num_tokens // (2 * num_keep)
            return Selection(indices.expand(batch, -1))
        real = tokens.valid.sum(dim=1, keepdim=True)  # [B, 1]
        kept = real.clamp(max=num_keep)
        rank = (2 * step + 1) * real // (2 * kept).clamp(min=1)  # [B, K], of the real tokens
        rank = torch.where(step < kept, rank, step)
        order = tokens.valid.sort(dim=1, descending=True, stable=True).indices
        return Selection(order.gather(1, rank), valid=step < kept)
