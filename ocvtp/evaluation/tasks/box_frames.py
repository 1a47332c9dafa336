"""From the numbers in which a model says boxes to pixels of the image that was asked about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.choices import Coordinates
from ocvtp.data.grounding import Box
from ocvtp.evaluation.tasks.object_cells import Sight
from ocvtp.transformers_names import BOX_COORDINATES

_THOUSAND = 1000.0
Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class _Picture:
    """What a model sees of an image.

    Args:
        size: width and height in its own pixels.
        part: the box of the image, in the image's pixels, that it is of; it may reach beyond it.
    """

    size: Size
    part: Box


class Frames:
    """Turns the boxes of a model's answers into boxes of images.

    Pixels and parts are those of the picture that the processor makes: one that is resized
    (Qwen2.5-VL) or cropped (LLaVA-1.5). Where it cuts an image into tiles they are of the image.

    Args:
        processor: of the model; None: it sees images as they are.
        coordinates: the numbers; `auto` takes four numbers that are all from 0 to 1 as parts, and
            others as models of this family mean them, or as pixels where that is not known.

    Raises:
        ValueError: for other coordinates.
    """

    def __init__(self, processor: Any = None, coordinates: Coordinates = "auto") -> None:
        if coordinates not in get_args(Coordinates):
            known = ", ".join(get_args(Coordinates))
            raise ValueError(f"coordinates={coordinates!r} are unknown; pass one of {known}.")
        self._images = getattr(processor, "image_processor", processor)
        self.coordinates = coordinates
        family = BOX_COORDINATES.get(type(processor).__name__, "pixels")
        self._whole: str = family if coordinates == "auto" else coordinates
        self._pictures: dict[Size, _Picture] = {}

    def in_image(self, box: Box, size: Size, shown: Size | None = None) -> Box:
        """A box in pixels of the image.

        Args:
            box: as the model said it.
            size: of the image. shown: of what the model was shown of it, if that was made smaller.
        """
        shown = shown or size
        kind = self._whole
        if self.coordinates == "auto" and all(0 <= number <= 1 for number in box):
            kind = "unit"
        picture = self._picture(shown)
        widths = {"unit": (1.0, 1.0), "thousand": (_THOUSAND, _THOUSAND), "pixels": picture.size}
        left, upper, right, lower = picture.part
        made = []
        for number, edge in enumerate(box):
            axis = number % 2
            low, high = (left, right) if axis == 0 else (upper, lower)
            in_shown = low + (high - low) * edge / widths[kind][axis]
            made.append(in_shown * size[axis] / shown[axis])
        return made[0], made[1], made[2], made[3]

    def _picture(self, size: Size) -> _Picture:
        if size not in self._pictures:
            self._pictures[size] = self._look(size)
        return self._pictures[size]

    def _look(self, size: Size) -> _Picture:
        """What the processor makes of an empty image of a size."""
        whole = (0.0, 0.0, float(size[0]), float(size[1]))
        if self._images is None:
            return _Picture(size, whole)
        made = self._images(images=[Image.new("RGB", size)], return_tensors="pt")
        grid = made.get("image_grid_thw")
        if grid is not None:
            side = int(self._images.patch_size)
            return _Picture((int(grid[0][2]) * side, int(grid[0][1]) * side), whole)
        pixels = made["pixel_values"]
        if pixels.ndim != 4 or len(pixels) != 1:
            return _Picture(size, whole)
        height, width = pixels.shape[-2:]
        return _Picture((int(width), int(height)), self._part(size))

    def _part(self, size: Size) -> Box:
        """The box of an image of a size that the one picture of it shows."""
        rows, columns, there = Sight(self._nearest, 1).sources(size)
        middle_y, middle_x = np.argwhere(there)[there.sum() // 2]
        left, right = _ends(columns[middle_y], there[middle_y], size[0])
        upper, lower = _ends(rows[:, middle_x], there[:, middle_x], size[1])
        return left, upper, right, lower

    def _nearest(self, image: Image.Image) -> NDArray[Any]:
        made = self._images(
            images=[image],
            return_tensors="pt",
            do_rescale=False,
            do_normalize=False,
            resample=Image.Resampling.NEAREST,
        )
        return np.asarray(made["pixel_values"][0].round().long().numpy())


def _ends(sources: NDArray[np.int64], there: NDArray[np.bool_], length: int) -> tuple[float, float]:
    """Where the first and the last edge of a row of pixels are in an image of so many pixels.

    Args:
        sources: [W] of each pixel the one of the image that is nearest. there: [W] if there is any.
        length: of the image.
    """
    places = there.nonzero()[0]
    first, last = int(places[0]), int(places[-1])
    start, end = int(sources[first]), int(sources[last])
    if start == 0 and end == length - 1:  # all of it: its edges are known exactly
        step = length / (last + 1 - first)
        low = 0.0
    else:
        step = (end - start) / max(last - first, 1)
        low = start + 0.5 - step / 2
    return low - step * first, low + step * (len(sources) - first)
