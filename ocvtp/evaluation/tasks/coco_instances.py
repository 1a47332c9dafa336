"""What is in COCO's images: the objects of each, and their masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.data.annotations import CocoFile, Entry
from ocvtp.data.grounding import Box, turned
from ocvtp.evaluation.tasks.question_files import name_of_2017
from ocvtp.images import opened, turn_of


class CocoInstances:
    """A COCO `instances` file, by the names of its images.

    Attributes:
        categories: names of all objects, in the file's order. names: the same by id.
        present: by image, the distinct objects in the order in which they are listed; crowds too,
            since what is in a crowd is in the image. Images in the file's order.
        image_ids: by image, its number.

    Args:
        path: of the file.

    Raises:
        ValueError: if it is missing or no `instances` file, or lists an image under two names.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._coco = CocoFile(path, with_categories=True)
        names = self.names = self._coco.categories
        self.categories: list[str] = list(names.values())
        self.image_ids: dict[str, int] = {
            entry["file_name"]: number for number, entry in self._coco.images.items()
        }
        self._later_names: dict[str, int] = {}
        for name, number in self.image_ids.items():
            same = self._later_names.setdefault(name_of_2017(name), number)
            if same != number:
                raise ValueError(
                    f"annotation file {path} cannot be used: images {same} and {number} are both "
                    f"called {name_of_2017(name)} in 2017; list every image once."
                )
        self.present: Mapping[str, list[str]] = {
            name: list(dict.fromkeys(names[e["category_id"]] for e in self._coco.objects(number)))
            for name, number in self.image_ids.items()
        }

    def objects(self, name: str) -> list[Entry]:
        """The annotations of an image, crowds too, in the file's order."""
        return self._coco.objects(self.image_ids[name])

    def upright_boxes(self, name: str, boxes: Sequence[Box], path: Path) -> list[Box]:
        """Boxes of an image's annotations on its upright picture, in pixels of that.

        They are cut off at its edges: those of published files may reach beyond them.

        Args:
            name: of an image that is listed. boxes: as x1, y1, x2, y2.
            path: of the image, which may have been resized.

        Raises:
            ValueError: if the image has another shape.
        """
        number = self._later_names[name_of_2017(name)]
        listed = self._coco.images[number]
        with opened(path) as image:
            image.load()  # a PNG's orientation may come after its pixels
            size, turn = image.size, turn_of(image)
        with self._fitting(name):
            self._coco.check_shape(number, size)
        ends = (listed["width"], listed["height"]) * 2
        cut = [[min(max(edge, 0.0), end) for edge, end in zip(b, ends, strict=True)] for b in boxes]
        scale = size[0] / listed["width"], size[1] / listed["height"]
        scaled = [
            (x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]) for x1, y1, x2, y2 in cut
        ]
        return [turned(box, size, turn) for box in scaled]

    def masks_of_file(self, name: str, path: Path) -> NDArray[np.bool_]:
        """`masks` of the image that lies there, upright."""
        with opened(path) as image:
            image.load()
            return self.masks(name, image.size, turn_of(image))

    def knows_masks(self, name: str) -> bool:
        """Whether an image is listed, and each of its objects has a mask; crowds do not count."""
        number = self._later_names.get(name_of_2017(name))
        return number is not None and self._coco.all_masked(number)

    def masks(
        self, name: str, size: tuple[int, int], turn: Image.Transpose | None = None
    ) -> NDArray[np.bool_]:
        """[O, H, W] masks of an image's objects, without crowds and those that have none.

        Args:
            name: of an image that is listed, COCO's of 2014 or of 2017.
            size: (W, H), pixels of the image as it is stored; masks of an image that was resized
                are brought to it.
            turn: what turns the stored image upright, and the masks with it.

        Raises:
            ValueError: if a mask is unreadable, or the image has another shape.
        """
        number = self._later_names[name_of_2017(name)]
        with self._fitting(name):
            return self._coco.upright_masks(number, self._coco.masked(number), size, turn)

    @contextmanager
    def _fitting(self, name: str) -> Iterator[None]:
        """Says of which image and file something is wrong."""
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"image {name} cannot be used with {self.path}: {error}; repair the file, or pass "
                "the one that describes the image."
            ) from error
