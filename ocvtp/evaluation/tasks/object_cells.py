"""Objects of an image on the grid of cells that the vision tower cuts its picture into.

H x W are the pixels of the picture as the tower saw it, O objects, N cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.encoders.base import FrozenEncoder
from ocvtp.hosts.sight import Sight as Sight
from ocvtp.hosts.sight import at_pixels as at_pixels
from ocvtp.hosts.sight import cell_pixels
from ocvtp.hosts.sight import sight_of_host as sight_of_host

CELL_PARTS = 4
"""A cell lies on an object that covers at least one part in so many of it."""


def cells_on(seen: NDArray[np.bool_], grid: tuple[int, int], patch: int) -> NDArray[np.bool_]:
    """Which cells lie on which objects.

    Cell n lies on object o if `a_on >= A / 4`, or `a_on = max_m a_om > 0`: a_on pixels of the
    cell's A are o's. The second is for objects that cover a quarter of no cell.

    Args:
        seen: [O, H, W] the objects in the picture.
        grid: rows and columns of cells; pixels to the right of and below the last are no cell's.
        patch: pixels along the side of a tower's patch; cells are a whole number of patches.

    Returns:
        [O, N] in raster order; no cell lies on an object that is not in the picture.
    """
    pixels, area = cell_pixels(seen, grid, patch)
    most = pixels.max(axis=1, keepdims=True)
    on: NDArray[np.bool_] = (pixels * CELL_PARTS >= area) | (pixels == most)
    on &= pixels > 0
    return on


def sight_of_encoder(encoder: FrozenEncoder) -> Sight:
    """That of a tower alone, by its own transform."""

    def nearest(image: Image.Image) -> NDArray[Any]:
        channels = np.asarray(image).transpose(2, 0, 1)
        made = [encoder.transform.instance_map(channel).numpy() for channel in channels]
        return np.stack(made)

    return Sight(nearest, encoder.patch_size)
