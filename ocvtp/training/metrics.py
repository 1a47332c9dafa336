"""How well kept tokens cover an image, and how well slots follow its objects.

h x w token grid, H x W pixels; I instances and L labels (slots) met in a batch, so that a
contingency table is [B, I, L] pixel counts.

Coverage needs no decoder and fits any pruner. It is computed in fp64, which neither autocast nor
TF32 reaches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

_RANK_TOLERANCE = 1e-5
"""Kept tokens nearer than this (radians) to the span of the others add nothing: it is rounding."""


def nearest_kept_distance(
    features: Tensor,
    keep_indices: Tensor,
    valid: Tensor | None = None,
    token_valid: Tensor | None = None,
) -> Tensor:
    """Cosine distance from each token to the nearest kept one, averaged over the tokens.

    Args:
        features: [B, N, D].
        keep_indices: [B, K] int64.
        valid: [B, K] bool, False on padding; None when every index counts.
        token_valid: [B, N] bool, False on padding tokens, which do not count; None without.

    Returns:
        [B] fp32, from 0 (every direction is kept) to 2. A zero vector is at distance 1 from
        everything; an image that keeps nothing is at 2.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    tokens = F.normalize(features.double(), dim=-1)
    kept = _gather_kept(tokens, keep_indices, valid)
    cosine = tokens @ kept.mT  # [B, N, K]
    if valid is not None:
        cosine = cosine.masked_fill(~valid[:, None, :], -1.0)
    nearest = cosine.amax(dim=-1).clamp(-1, 1)  # [B, N]
    if token_valid is None:
        return (1 - nearest.mean(dim=-1)).float()
    return (1 - (nearest * token_valid).sum(dim=-1) / token_valid.sum(dim=-1)).float()


def reconstruction_residual(
    features: Tensor,
    keep_indices: Tensor,
    valid: Tensor | None = None,
    token_valid: Tensor | None = None,
) -> Tensor:
    """Relative squared error of the least-squares reconstruction of all tokens from the kept ones.

    ||X - P X||^2 / ||X||^2, P the orthogonal projection on the span of the kept tokens. The span
    comes from the eigenvectors of their K x K cosine matrix, cheaper than their SVD; directions
    below `_RANK_TOLERANCE` are left out, so that repeated, dependent and padded tokens do no harm.

    Args:
        features: [B, N, D], finite.
        keep_indices: [B, K] int64.
        valid: [B, K] bool, False on padding; None when every index counts.
        token_valid: [B, N] bool, False on padding tokens, which do not count; None without.

    Returns:
        [B] fp32 in [0, 1]: 0 when the kept tokens span the rest, 1 when nothing is kept. An image
        of zeros has nothing to reconstruct: 0.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    tokens = features.double()
    if token_valid is not None:
        tokens = tokens * token_valid[..., None]
    kept = F.normalize(_gather_kept(tokens, keep_indices, valid), dim=-1)
    scale, rotation = torch.linalg.eigh(kept @ kept.mT)  # [B, K], [B, K, K]
    basis = F.normalize(rotation.mT @ kept, dim=-1)  # [B, K, D], orthonormal but for rank
    explained = (tokens @ basis.mT).square().sum(dim=1)  # [B, K]
    explained = (explained * (scale > _RANK_TOLERANCE**2)).sum(dim=-1)
    energy = tokens.square().sum(dim=(1, 2))
    residual: Tensor = (energy - explained) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    return residual.clamp(0, 1).float()


def _gather_kept(tokens: Tensor, keep_indices: Tensor, valid: Tensor | None) -> Tensor:
    """[B, K, D] kept tokens, zero where `valid` is False, whatever the index is there."""
    if tokens.ndim != 3 or keep_indices.ndim != 2 or len(tokens) != len(keep_indices):
        raise ValueError(
            f"features {list(tokens.shape)} and keep_indices {list(keep_indices.shape)} do not "
            "fit; pass [B, N, D] and [B, K] of the same images."
        )
    if keep_indices.shape[1] == 0:
        raise ValueError("keep_indices is [B, 0]; pass at least one column (padded if need be).")
    if valid is None:
        return tokens.gather(1, keep_indices[..., None].expand(-1, -1, tokens.shape[-1]))
    if valid.shape != keep_indices.shape or valid.dtype != torch.bool:
        raise ValueError(
            f"valid is {valid.dtype} {list(valid.shape)}; pass torch.bool "
            f"{list(keep_indices.shape)}, the shape of keep_indices."
        )
    indices = keep_indices.masked_fill(~valid, 0)[..., None]
    return tokens.gather(1, indices.expand(-1, -1, tokens.shape[-1])) * valid[..., None]


def slot_labels(attention: Tensor, grid_hw: tuple[int, int], size_hw: tuple[int, int]) -> Tensor:
    """Slot of each pixel: masks upsampled bilinearly, then argmax over slots.

    The order of the object-centric literature (DINOSAUR, arXiv 2209.14860): upsampling the
    soft masks first gives smoother borders than upsampling labels. Needs B S H W floats.

    Args:
        attention: [B, S, N] slot masks, one column a token.
        grid_hw: rows and columns of the token grid.
        size_hw: height and width of the result, in pixels.

    Returns:
        [B, H, W] int64 in 0..S-1.

    Raises:
        ValueError: if N is not the number of cells of the grid.
    """
    if attention.ndim != 3 or attention.shape[-1] != grid_hw[0] * grid_hw[1]:
        raise ValueError(
            f"attention {list(attention.shape)} does not fit the grid {tuple(grid_hw)}; "
            f"pass [B, S, {grid_hw[0] * grid_hw[1]}]."
        )
    masks = attention.float().reshape(*attention.shape[:2], *grid_hw)  # [B, S, h, w]
    masks = F.interpolate(masks, size=size_hw, mode="bilinear", align_corners=False)
    return masks.argmax(dim=1)  # [B, H, W]


class ForegroundARI(Metric):
    """FG-ARI: adjusted Rand index over the pixels of ground-truth instances, mean over images.

    Adjusted Rand index: Hubert & Arabie 1985, eq. 5; on the foreground: Greff et al. 2019 (IODINE,
    arXiv 1903.00450). Images without instances do not count. An image of a single instance counts
    by default, as in the usual evaluation code, though the index is all or nothing there: 1 if one
    slot covers the instance, else 0. `min_instances=2` leaves those images out.

    `compute` returns an fp32 scalar, NaN only if no image counted.

    Args:
        min_instances: fewest instances of an image that counts, at least 1.

    Raises:
        ValueError: if `min_instances` is below 1.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    # State names differ between metrics: a MetricCollection merges metrics of equal states.
    ari_sum: Tensor
    ari_images: Tensor

    def __init__(self, min_instances: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min_instances < 1:
            raise ValueError(f"min_instances={min_instances} is below 1; pass 1 or 2.")
        self.min_instances = min_instances
        self.add_state("ari_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("ari_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, instances: Tensor) -> None:
        """Add [B, H, W] slot labels and [B, H, W] instance ids, 0 (or below) = background."""
        table = _contingency(labels, instances)[0].double()
        sizes = table.sum(dim=2)  # [B, I]
        counted = (sizes > 0).sum(dim=1) >= self.min_instances
        together = _pairs(table).sum(dim=(1, 2))
        same_instance, same_slot = _pairs(sizes).sum(dim=1), _pairs(table.sum(dim=1)).sum(dim=1)
        expected = same_instance * same_slot / _pairs(sizes.sum(dim=1))
        score = (together - expected) / ((same_instance + same_slot) / 2 - expected)
        # Equal partitions, the degenerate 0 / 0 ones (a single cluster, single pixels) among them.
        score = score.masked_fill((together == same_instance) & (together == same_slot), 1.0)
        # Not in place: a state made under inference mode may be updated outside of it.
        self.ari_sum = self.ari_sum + score[counted].sum()
        self.ari_images = self.ari_images + counted.sum()

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Of the images that counted, and their number."""
        return self.ari_sum, self.ari_images

    def compute(self) -> Tensor:
        """Mean over the images that counted."""
        return (self.ari_sum / self.ari_images).float()


class MeanBestOverlap(Metric):
    """mBO^i: the best IoU of each instance over slots, mean over instances, then over images.

    Source: Pont-Tuset et al. 2017 (MCG, arXiv 1503.00848); for slots DINOSAUR (arXiv 2209.14860).
    A slot's pixels on the background count in the union. Images without instances do not count.
    `compute` returns an fp32 scalar, NaN only if no image counted.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    overlap_sum: Tensor
    overlap_images: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("overlap_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("overlap_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, instances: Tensor) -> None:
        """Add [B, H, W] slot labels and [B, H, W] instance ids, 0 (or below) = background."""
        table, slot_sizes = _contingency(labels, instances)
        sizes = table.sum(dim=2)  # [B, I]
        union = sizes[:, :, None] + slot_sizes[:, None, :] - table  # [B, I, L]
        best = (table.double() / union.clamp_min(1)).amax(dim=2)  # [B, I], 0 where absent
        present = (sizes > 0).sum(dim=1)
        self.overlap_sum = self.overlap_sum + (best.sum(dim=1) / present.clamp_min(1)).sum()
        self.overlap_images = self.overlap_images + (present > 0).sum()

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Of the images that counted, and their number."""
        return self.overlap_sum, self.overlap_images

    def compute(self) -> Tensor:
        """Mean over the images that counted."""
        return (self.overlap_sum / self.overlap_images).float()


def _pairs(count: Tensor) -> Tensor:
    """Pairs among `count` things; whole numbers, exact in fp64."""
    return count * (count - 1) / 2


def _contingency(labels: Tensor, instances: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of each (instance, slot) pair [B, I, L], and of each slot on the whole image [B, L].

    Ids are those of the whole batch, compacted, so large ones cost nothing; an instance that is not
    in an image is a row of zeros there.
    """
    if labels.ndim != 3 or labels.shape != instances.shape:
        raise ValueError(
            f"labels {list(labels.shape)} and instances {list(instances.shape)} do not fit; pass "
            "[B, H, W] both (`slot_labels` resizes slot masks)."
        )
    slots, column = torch.unique(labels, return_inverse=True)
    ids, row = torch.unique(instances, return_inverse=True)
    images, num_slots, num_ids = len(labels), len(slots), len(ids)
    image = torch.arange(images, device=labels.device)[:, None, None]
    cell = (image * num_ids + row) * num_slots + column  # [B, H, W]
    table = cell.flatten().bincount(minlength=images * num_ids * num_slots)
    table = table.view(images, num_ids, num_slots)
    return table[:, ids > 0], table.sum(dim=1)
