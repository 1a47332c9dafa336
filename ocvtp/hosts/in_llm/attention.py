"""Attention of a few rows of the language model, in fp32, from its own queries and keys.

R query rows, S columns, H heads, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocvtp.transformers_names import rotate_heads

_CHUNK = 256  # rows at a time


def turn(attention: Any, states: Tensor, norm: str, cos: Tensor, sin: Tensor) -> Tensor:
    """Projected queries or keys as the attention compares them: normed and turned.

    Args:
        attention: the layer's module, whose own functions are used.
        states: [I, R, H d].
        norm: its norm of single heads, where it has one: `q_norm` or `k_norm`.
        cos: [..., I, R, d] and sin: of their positions.

    Returns:
        [I, H, R, d].
    """
    heads = states.unflatten(-1, (-1, attention.head_dim))
    if (module := getattr(attention, norm, None)) is not None:
        heads = module(heads)
    return rotate_heads(attention, heads.transpose(1, 2), cos, sin)


def turn_to_start(attention: Any, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turned keys as if the column whose turn is given were in the first position.

    Args:
        attention: the layer's module, whose own function turns them back.
        keys: [I, H, R, d].
        cos: [..., I, 1, d] and sin: of that column.

    Returns:
        [I, H, R, d]; the same bit for bit where the column is there.
    """
    length = (cos.float().square() + sin.float().square()).sqrt()  # 1, or the model's own scale
    turned = rotate_heads(attention, keys.float(), cos / length, -sin / length)
    return turned.to(keys.dtype)


def rows_of_attention(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    mask: Tensor,
    query_columns: Tensor,
    heads_apart: bool = False,
) -> Tensor:
    """Attention of some rows to all columns up to their own, the mean over heads.

    Args:
        queries: [I, H, R, d]. keys: [I, H', S, d], H' a divisor of H.
        scaling: of their products.
        mask: [I, S] bool, False on padding.
        query_columns: [I, R] where the rows are among the S.
        heads_apart: whether each head's is returned.

    Returns:
        [I, R, S] in fp32, rows sum to 1; [I, R, S, H] of heads apart.
    """
    columns = torch.arange(keys.shape[2], device=keys.device)
    place = query_columns[:, :, None]
    seen = mask[:, None] & (columns <= place) | (columns == place)  # [I, R, S]
    if heads_apart:
        return _shares(queries, keys, scaling, seen).flatten(1, 2).movedim(1, -1)
    return _head_means(queries, keys, scaling, seen)


def among_each_other(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Attention that tokens receive of each other, the mean over heads and queries.

    Args:
        queries: [I, H, N, d]. keys: [I, H', N, d] of the same tokens. scaling: of their products.

    Returns:
        [I, N] in fp32, sums to 1.
    """
    total = queries.new_zeros(len(queries), keys.shape[2], dtype=torch.float32)
    for part in queries.split(_CHUNK, dim=2):
        total += _head_means(part, keys, scaling, None).sum(dim=1)
    return total / queries.shape[2]


def _head_means(queries: Tensor, keys: Tensor, scaling: float, seen: Tensor | None) -> Tensor:
    return _shares(queries, keys, scaling, seen).mean(dim=(1, 2))


def _shares(queries: Tensor, keys: Tensor, scaling: float, seen: Tensor | None) -> Tensor:
    """[I, H', H / H', R, S]."""
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # [I, H', H / H', R, d]
    logits = grouped @ keys.float()[:, :, None].transpose(3, 4) * scaling
    if seen is not None:
        logits = logits.masked_fill(~seen[:, None, None], float("-inf"))
    return logits.softmax(dim=-1)
