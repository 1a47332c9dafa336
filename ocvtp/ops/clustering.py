"""Clusters of tokens around peaks of density."""

from __future__ import annotations

import torch
from torch import Tensor

from ocvtp.ops.merging import merge_rows, merged
from ocvtp.ops.selection import descending, ranks
from ocvtp.ops.similarity import full
from ocvtp.structures import Selection, take


def density_peaks(
    points: Tensor, num_clusters: int, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """DPC-kNN: centres are points in dense places that are far from every denser one.

    The density of a point is exp(-mean squared distance to its c nearest points, itself among
    them); its separation is the distance to the nearest denser point, for the densest the largest
    distance of all. The c points of the largest product are centres, each other point joins the
    nearest of them. Distances are divided by sqrt(D), as in SparseVLM's code (arXiv 2410.04417,
    recycling), and of equally dense points the first counts as the denser.

    Args:
        points: [B, n, D].
        num_clusters: c, 1 <= c <= n.
        noise: [B, n], added to the densities; the official code draws it from [0, 1e-6).

    Returns:
        [B, n] the number of the cluster of every point, and [B, c] the point at the centre of each,
        the clearest peak first.
    """
    points = full(points)
    distance = torch.cdist(points, points) / points.shape[2] ** 0.5  # [B, n, n]
    near = distance.topk(num_clusters, dim=2, largest=False).values
    density = (-near.square().mean(dim=2)).exp()
    if noise is not None:
        density = density + noise
    rank = ranks(descending(density, None))  # [B, n]
    denser = rank[:, None] < rank[:, :, None]
    farthest = distance.amax(dim=(1, 2))[:, None, None]
    separation = torch.where(denser, distance, farthest).amin(dim=2)
    centres = descending(density * separation, None)[:, :num_clusters]
    clusters = take(distance, centres).argmin(dim=1)  # [B, n]
    numbers = torch.arange(num_clusters, device=centres.device).expand_as(centres)
    return clusters.scatter(1, centres, numbers), centres


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
