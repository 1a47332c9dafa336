"""How a vision tower sees images: which pixels of an image its picture has, and in which cells.

H x W are the pixels of the picture as the tower saw it, h x w those of the image as stored,
O objects, N cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.hosts.base import Host

_Sources = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class Sight:
    """How a vision tower sees images.

    Args:
        nearest: an image as the picture [3, H, W] that the tower sees, neither scaled nor
            normalised, its pixels the nearest ones; 0 where none of the image is.
        patch: pixels along the side of a patch of the tower.
    """

    nearest: Callable[[Image.Image], NDArray[Any]]
    patch: int
    _known: dict[tuple[int, int], _Sources] = field(default_factory=dict, repr=False)

    def sources(self, size: tuple[int, int]) -> _Sources:
        """Where the pixels of the picture come from.

        The tower's own image processing says so: it is given two images of the pixels' coordinates
        (low and high bytes).

        Args:
            size: w, h of an image as stored.

        Returns:
            [H, W] row and column in the image, and whether there is one: borders may be added.
        """
        if size not in self._known:
            rows, columns = np.indices(size[::-1])
            inside = np.full_like(rows, 255)
            low, high = (
                self.nearest(Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)))
                for channels in (
                    (rows % 256, columns % 256, inside),
                    (rows // 256, columns // 256, inside),
                )
            )
            there = low[2] == 255
            row, column = (low[:2].astype(np.int64) + 256 * high[:2].astype(np.int64)) * there
            self._known[size] = row, column, there
        return self._known[size]

    def seen(self, masks: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
        """[O, H, W] what the picture shows of the masks of an image, which is stored as w, h."""
        rows, columns, inside = self.sources(size)
        there: NDArray[np.bool_] = at_pixels(masks, rows, columns, size[::-1]) & inside
        return there


def sight_of_host(host: Host, processor: Any) -> Sight:
    """That of a model's tower, by the processor that makes its pixels."""

    def nearest(image: Image.Image) -> NDArray[Any]:
        made = processor(
            images=[image],
            return_tensors="pt",
            do_rescale=False,
            do_normalize=False,
            resample=Image.Resampling.NEAREST,
        )
        picture = host.picture({key: made[key] for key in host.image_keys if key in made})
        return np.asarray(picture.round().long().numpy())

    return Sight(nearest, patch_side(host))


def cell_pixels(
    seen: NDArray[np.bool_], grid: tuple[int, int], patch: int
) -> tuple[NDArray[np.int64], int]:
    """How many pixels of each cell show each object.

    Args:
        seen: [O, H, W] the objects in the picture.
        grid: rows and columns of cells; pixels to the right of and below the last are no cell's.
        patch: pixels along the side of a tower's patch; cells are a whole number of patches.

    Returns:
        [O, N] in raster order, and the pixels of a cell.
    """
    rows, columns = grid
    height, width = (
        pixels // count // patch * patch for pixels, count in zip(seen.shape[1:], grid, strict=True)
    )
    whole = seen[:, : rows * height, : columns * width]
    of_cells = whole.reshape(-1, rows, height, columns, width).sum(axis=(2, 4))
    pixels: NDArray[np.int64] = of_cells.reshape(-1, rows * columns)
    return pixels, height * width


def at_pixels(
    masks: NDArray[np.bool_],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    size: tuple[int, int],
) -> NDArray[np.bool_]:
    """[O, H, W] masks at pixels [H, W] of an image of `size` h, w, which may be a resized one."""
    height, width = masks.shape[1:]
    return masks[:, rows * height // size[0], columns * width // size[1]]


def patch_side(host: Host) -> int:
    """Pixels along the side of a patch of the tower."""
    tower: Any = host.tower
    patch = tower.config.patch_size
    return int(patch if isinstance(patch, int) else patch[0])
