"""Clusters that keep a few tokens each and merge the others."""

from __future__ import annotations

import torch
from torch import Tensor

from ocvtp.ops.merging import merge_rows, merged
from ocvtp.ops.selection import descending, ranks
from ocvtp.structures import Selection


def keep_in_clusters(labels: Tensor, num_clusters: int, scores: Tensor, num_keep: int) -> Selection:
    """Of every cluster a quota of tokens as they are, and one row: the mean of its others.

    The R - C tokens that stay are shared among clusters in proportion to their sizes less one. If
    there are fewer rows than clusters, the R - 1 smallest stay apart, and the others become one.
    A mean stands in the middle of its tokens; rows: single tokens in raster order, then clusters.

    Args:
        labels: [B, N], each of 0 to C - 1 at least once in every image.
        num_clusters: C.
        scores: [B, N], the lowest stay.
        num_keep: R, 1 <= R <= N.
    """
    sizes = _sizes(labels, num_clusters)
    if num_keep < num_clusters:
        groups = _small_first(sizes).clamp(max=num_keep - 1)
        labels, num_clusters = groups.gather(1, labels), num_keep
        sizes = _sizes(labels, num_clusters)
    quotas = shared_out(sizes, num_keep - num_clusters)
    best = descending(-scores, None)
    grouped = best.gather(1, labels.gather(1, best).sort(dim=1, stable=True).indices)
    first = (sizes.cumsum(dim=1) - sizes).gather(1, labels)
    alone = ranks(grouped) - first < quotas.gather(1, labels)  # [B, N]
    num_alone = num_keep - num_clusters
    row_of = torch.where(alone, alone.cumsum(dim=1) - 1, num_alone + labels)
    left = sizes - quotas  # [B, C], at least 1
    share = left.gather(1, labels).float().reciprocal()
    merge = merge_rows(row_of, share.masked_fill(alone, 1.0), num_keep)
    singles = alone.sort(dim=1, descending=True, stable=True).indices[:, :num_alone]
    return merged(merge, torch.cat([singles, _middles(labels, ~alone, left)], dim=1))


def shared_out(sizes: Tensor, total: int) -> Tensor:
    """[B, C] how many of `total` tokens each cluster keeps, at most its size less one.

    Shares are rounded, half to even. What is missing then is given to the smallest clusters, what
    is too much is taken from the largest, one each; of equal ones the later counts as the smaller.

    Args:
        sizes: [B, C], at least 1.
        total: at most the sum of sizes less one.
    """
    room = sizes - 1
    wanted = total * room.double() / room.sum(dim=1, keepdim=True).clamp(min=1)
    quotas = wanted.round().long()
    missing = total - quotas.sum(dim=1, keepdim=True)  # [B, 1]
    small = _small_first(sizes)
    more = _first_of(quotas < room, small, missing)
    less = _first_of(quotas > 0, sizes.shape[1] - 1 - small, -missing)
    return quotas + more.long() - less.long()


def _sizes(labels: Tensor, num_clusters: int) -> Tensor:
    sizes = labels.new_zeros(len(labels), num_clusters)
    return sizes.scatter_add(1, labels, torch.ones_like(labels))


def _small_first(sizes: Tensor) -> Tensor:
    """[B, C] the place of every cluster in their order by size."""
    later = torch.arange(sizes.shape[1], device=sizes.device).flip(0)
    return ranks((sizes * sizes.shape[1] + later).argsort(dim=1))


def _first_of(eligible: Tensor, place: Tensor, count: Tensor) -> Tensor:
    """[B, C] bool: the first `count` [B, 1] eligible clusters in the order of their places."""
    order = place.argsort(dim=1)
    there = eligible.gather(1, order)
    chosen = there & (there.cumsum(dim=1) <= count)
    return chosen.gather(1, place)


def _middles(labels: Tensor, rest: Tensor, counts: Tensor) -> Tensor:
    """[B, C] the middle one of every cluster's tokens among `rest` [B, N], of `counts` [B, C]."""
    clusters = torch.arange(counts.shape[1], device=labels.device)[:, None]
    members = (labels[:, None] == clusters) & rest[:, None]  # [B, C, N]
    rank = members.cumsum(dim=2) - 1
    return (members & (rank == (counts // 2)[:, :, None])).int().argmax(dim=2)
