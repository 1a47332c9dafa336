"""Bipartite soft matching, and how many tokens to merge in which block (ToMe, arXiv 2210.09461).

T are the tokens of a block, the CLS first where there is one; r of them are merged away, and
T' = T - r rows are left. L blocks; d is the width of the metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

from ocvtp.ops.selection import descending, ranks
from ocvtp.ops.similarity import full, unit

MergeSpec: TypeAlias = int | Sequence[int] | tuple[int, float]
"""How many tokens each block merges: one number for all; one for each; or `(r, inflect)`, r on
average, going linearly from (1 - inflect) r in the first block to (1 + inflect) r in the last."""


def match(
    metric: Tensor, num_merged: int | Tensor, has_cls: bool, real: Tensor | None = None
) -> Tensor:
    """Merge the r tokens that are most similar to one of the other half.

    Tokens in even places (A) may be merged into their most similar one in odd places (B); the r
    best pairs are. Rows are in the order of the official code: what is left of A, then B. A is in
    raster order where there is a CLS, otherwise by falling similarity.

    Args:
        metric: [B, T, d], what similarity is measured on.
        num_merged: r, at most half of the tokens, the CLS apart; [B, 1] if images differ.
        has_cls: whether the first token is a CLS, which is left alone and stays first.
        real: [B, T] bool, False on padding, whose rows come last.

    Returns:
        [B, T] the row, of T - r, that every token goes to.
    """
    directions = unit(metric)
    similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)  # [B, A's, B's]
    if has_cls:
        similarity[:, 0] = float("-inf")
    if real is not None:
        pairs = real[:, ::2, None] & real[:, None, 1::2]
        similarity = similarity.masked_fill(~pairs, float("-inf"))
    best, partner = similarity.max(dim=2)
    rank = ranks(descending(best, None))
    is_merged = rank < num_merged
    count = metric.shape[1]
    number = torch.arange(count, device=metric.device).repeat(len(metric), 1)
    key = number + count  # A before B, padding after them, what is merged last
    key[:, ::2] = number[:, : rank.shape[1]] if has_cls else rank
    if real is not None:
        key = key + 2 * count * ~real
    key[:, ::2] = key[:, ::2].masked_fill(is_merged, 5 * count)
    row_of = ranks(key.sort(dim=1).indices)
    row_of[:, ::2] = torch.where(is_merged, row_of[:, 1::2].gather(1, partner), row_of[:, ::2])
    return row_of


def merge_down(metric: Tensor, num_keep: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge round by round, at most half of the tokens in each, until K are left.

    Args:
        metric: [B, N, d].
        num_keep: K.
        valid: [B, N] bool, False on padding, which is last; images of fewer tokens stay whole.

    Returns:
        [B, N] the row that every token goes to, K on padding; [B, K] how many went to each.
    """
    size = metric.shape[:2]
    real = torch.ones(size, dtype=torch.bool, device=metric.device) if valid is None else valid
    row_of = torch.arange(size[1], device=metric.device).expand(size)
    sizes, left = real.to(metric.dtype), size[1]
    while left > num_keep:
        count = real.sum(dim=1, keepdim=True)
        num_merged = (count - (count - count // 2).clamp(min=num_keep)).clamp(min=0)
        row = match(metric, num_merged, False, real)
        metric, sizes = means(metric, sizes, row, left)
        row_of, left = row.gather(1, row_of), max(num_keep, left - left // 2)
        metric, sizes = metric[:, :left], sizes[:, :left]
        real = torch.arange(left, device=metric.device) < count - num_merged
        row_of = row_of.clamp(max=left - 1)  # padding beyond the rows that are left
    return row_of if valid is None else row_of.masked_fill(~valid, num_keep), sizes


def sums(values: Tensor, row_of: Tensor, num_rows: int) -> Tensor:
    """[B, T, D] summed by rows: [B, T', D]."""
    index = row_of[:, :, None].expand_as(values)
    return values.new_zeros(len(values), num_rows, values.shape[2]).scatter_add(1, index, values)


def means(values: Tensor, sizes: Tensor, row_of: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The tokens of each row averaged by their sizes, in fp32 or better.

    Args:
        values: [B, T, D].
        sizes: [B, T] of how many tokens each is the mean already.
        row_of: [B, T] see `match`.
        num_rows: T'.

    Returns:
        [B, T', D] in the values' precision, and the new sizes [B, T'].
    """
    weights = sizes[:, :, None]
    total = sums(weights, row_of, num_rows)  # [B, T', 1]
    mixed = sums(full(values) * weights, row_of, num_rows) / total.clamp(min=1)
    return mixed.to(values.dtype), total.squeeze(2)


def first_places(places: Tensor, row_of: Tensor, num_rows: int) -> Tensor:
    """The lowest place among the tokens of each row: [B, T] -> [B, T']."""
    lowest = places.new_zeros(len(places), num_rows)
    return lowest.scatter_reduce(1, row_of, places, "amin", include_self=False)


def even_schedule(num_tokens: int, num_keep: int, num_blocks: int) -> tuple[int, ...]:
    """How many tokens each of L blocks merges so that just K of N are left, as evenly as can be.

    A block merges at most half of its tokens; where an even share would leave more than the blocks
    after it can merge, it takes more.

    Raises:
        ValueError: if halving them in every block leaves more than K.
    """
    least = -(-num_tokens // 2**num_blocks)
    if num_keep < least:
        raise ValueError(
            f"num_keep={num_keep} of {num_tokens} tokens in {num_blocks} blocks; a block merges at"
            f" most half of its tokens: pass at least {least}."
        )
    merged, left = [], num_tokens
    for blocks_after in reversed(range(num_blocks)):
        share = -(-(left - num_keep) // (blocks_after + 1))
        merged.append(max(share, left - num_keep * 2**blocks_after))
        left -= merged[-1]
    return tuple(merged)


def parse_r(spec: MergeSpec, num_blocks: int) -> tuple[int, ...]:
    """The official code's language for how many tokens each of L blocks merges.

    Args:
        spec: see `MergeSpec`; in a list, blocks after its end merge none.
        num_blocks: L.

    Raises:
        ValueError: if it says nothing of the kind.
    """
    inflect = 0.0
    if isinstance(spec, tuple) and len(spec) == 2:
        spec, inflect = spec
    if isinstance(spec, Sequence):
        if len(spec) > num_blocks or not all(map(_is_whole, spec)):
            raise ValueError(
                f"r={list(spec)}; pass whole numbers from 0 on, one for each of at most"
                f" {num_blocks} blocks, or (r, inflect)."
            )
        return (*map(int, spec), *[0] * (num_blocks - len(spec)))
    if not _is_whole(spec) or not isinstance(inflect, int | float) or not -1 <= inflect <= 1:
        raise ValueError(
            f"r={spec!r}, inflect={inflect!r}; pass a whole r from 0 on and an inflect of -1 to 1."
        )
    low = int(spec * (1.0 - inflect))
    step = (2 * spec - 2 * low) / max(num_blocks - 1, 1)
    return tuple(int(low + step * block) for block in range(num_blocks))


def _is_whole(r: object) -> bool:
    if isinstance(r, bool) or not isinstance(r, Real):
        return False
    return float(r).is_integer() and float(r) >= 0
