"""Pure tensor cores that methods share.

B images, N visual tokens, K kept. Ties go to the lower index, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ocvtp.structures import Selection


def ascending(indices: Tensor, valid: Tensor | None, num_tokens: int) -> Selection:
    """Chosen indices as a `Selection`: sorted, those of padding tokens last and marked.

    Args:
        indices: [B, K], unique within an image.
        valid: [B, N] bool, or None when all tokens are real.
        num_tokens: N.
    """
    if valid is None:
        return Selection(indices.sort(dim=1).values)
    key = indices + num_tokens * (~valid.gather(1, indices)).long()
    key = key.sort(dim=1).values
    return Selection(key % num_tokens, valid=key < num_tokens)


def top_k(scores: Tensor, num_keep: int, valid: Tensor | None = None) -> Selection:
    """The K tokens of the highest score.

    Args:
        scores: [B, N].
        num_keep: K.
        valid: [B, N] bool; padding tokens come after all others.
    """
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return ascending(order[:, :num_keep], valid, scores.shape[1])


def fill_up(
    chosen: Tensor, scores: Tensor, num_keep: int, valid: Tensor | None = None
) -> Selection:
    """All chosen tokens, filled up to K by score; if more than K are chosen, the best of them.

    Args:
        chosen: [B, N] bool.
        scores: [B, N].
        num_keep: K.
        valid: [B, N] bool.
    """
    # Two stable sorts: adding a bonus to the chosen ones' scores would round close scores together.
    order = scores.sort(dim=1, descending=True, stable=True).indices
    first = chosen if valid is None else chosen & valid
    late = (~first).to(torch.int8)
    if valid is not None:
        late = late + (~valid).to(torch.int8)
    rank = late.gather(1, order).sort(dim=1, stable=True).indices
    return ascending(order.gather(1, rank)[:, :num_keep], valid, scores.shape[1])
