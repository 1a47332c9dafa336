"""What the frozen tower makes of the composites, kept on disk: it runs once.

B are the composites of a shard, N the patches, D the tower's width, O the most objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ocvtp.evaluation.oracle import LEAST_COVER, on_cells
from ocvtp.reporting.files import replacing
from ocvtp.reporting.progress import progress_bar
from tools.photo_vlm.composites import MOST_OBJECTS, Composite, Painter
from tools.photo_vlm.tower import encode

PER_SHARD = 50

_BATCH = 5


@dataclass(frozen=True)
class Encoded:
    """Composites as the tower sees them, and what is there.

    Args:
        features: [B, N, D] float16.
        patches: [B, N] uint8: 0 for background, else 1 + the number of the category.
        objects: [B, O, 4] float32: the number of the category (-1: there is no such object),
            visible pixels, and the x and y of the middle in parts of the picture.
    """

    features: Tensor
    patches: Tensor
    objects: Tensor

    def __len__(self) -> int:
        return len(self.patches)


def encode_all(painter: Painter, tower: Any, processor: Any, folder: Path, num: int) -> list[Path]:
    """Encode the first `num` composites, shard by shard; those that are on disk stay.

    Args:
        painter: draws them.
        tower: `Dinov2Model`.
        processor: of its images.
        folder: of the shards; made where absent.
        num: a last shard that is not full holds the rest.

    Returns:
        The files, in order.
    """
    starts = range(0, num, PER_SHARD)
    paths = [
        folder / f"{start:06d}-{min(start + PER_SHARD, num):06d}.safetensors" for start in starts
    ]
    with progress_bar() as progress:
        task = progress.add_task(f"encode {folder.name}", total=num)
        for start, path in zip(starts, paths, strict=True):
            numbers = range(start, min(start + PER_SHARD, num))
            if not path.is_file():
                drawn = [painter.draw(number) for number in numbers]
                shard = encode_shard(drawn, tower, processor, painter.cutouts.categories)
                with replacing(path) as temporary:
                    save_file(shard, temporary)
            progress.advance(task, len(numbers))
    return paths


def encode_shard(
    composites: Sequence[Composite], tower: Any, processor: Any, categories: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of `Encoded`, by name."""
    grid = 2 * (composites[0].image.shape[0] // tower.config.patch_size,)
    device = next(tower.parameters()).device
    features = []
    for start in range(0, len(composites), _BATCH):
        images = [Image.fromarray(one.image) for one in composites[start : start + _BATCH]]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        features.append(encode(tower, pixels.to(device)).to("cpu", torch.float16))
    return {
        "features": torch.cat(features),
        "patches": torch.stack([patch_labels(one, grid, categories) for one in composites]),
        "objects": torch.stack([object_table(one, categories) for one in composites]),
    }


def patch_labels(composite: Composite, grid: tuple[int, int], categories: Sequence[str]) -> Tensor:
    """[N] see `Encoded.patches`: the object that covers most of a patch, if it covers enough."""
    cover = on_cells(np.stack([item.mask for item in composite.objects]), grid)  # [O, N]
    numbers = np.array([1 + categories.index(item.category) for item in composite.objects])
    labels = np.where(cover.max(0) >= LEAST_COVER, numbers[cover.argmax(0)], 0)
    return torch.from_numpy(labels.astype(np.uint8))


def object_table(composite: Composite, categories: Sequence[str]) -> Tensor:
    """[O, 4] see `Encoded.objects`."""
    table = torch.full((MOST_OBJECTS, 4), -1.0)
    for row, item in zip(table, composite.objects, strict=False):
        row[:] = torch.tensor([categories.index(item.category), item.area, *item.centre])
    return table


def read_shards(paths: Sequence[Path]) -> Encoded:
    """All of them, in order."""
    shards = [load_file(path) for path in paths]
    return Encoded(**{name: torch.cat([s[name] for s in shards]) for name in shards[0]})
