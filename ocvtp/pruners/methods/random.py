from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.selection import top_k
from ocvtp.pruners.base import Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Selection, VisualTokens


@register("random")
@dataclass(kw_only=True, eq=False)
class Random(Pruner):
    """Random: keep K tokens without replacement, a control that every method must beat.

    Paper: none.

    Args:
        num_keep: tokens kept per image.
        seed: of the draw; average accuracies over several. An image's draw depends on it and on
            the image's place in the batch.
    Deviations: none.
    """

    seed: int = 0

    title: ClassVar[str] = (
        "Random: keep K tokens without replacement, a control that every method must beat."
    )
    reads: ClassVar[str] = "-"
    status: ClassVar[Status] = "control"
    batch_invariant: ClassVar[bool] = False

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        batch, num_tokens = tokens.features.shape[:2]
        row = torch.arange(batch, device=tokens.features.device)[:, None]
        column = torch.arange(num_tokens, device=tokens.features.device)
        noise = _hash(_hash(_hash(column) + row) + self.seed)  # [B, N]
        return top_k(noise.float(), num_keep, tokens.valid)


def _hash(x: Tensor) -> Tensor:
    """Mix integers into 31 random-looking bits: the same draw on every device, without a state.

    The finaliser of MurmurHash3 with 31-bit constants, so that products fit into int64.
    """
    for multiplier in (0x7FEB352D, 0x6C078965):
        x = ((x ^ (x >> 16)) * multiplier) & 0x7FFFFFFF
    return x ^ (x >> 15)
