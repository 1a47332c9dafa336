"""Clusters of tokens around peaks of density."""

from __future__ import annotations

import torch
from torch import Tensor

from ocvtp.ops.selection import descending, ranks
from ocvtp.ops.similarity import full
from ocvtp.structures import take


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
