"""What is in COCO's images: the objects of each, and their masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.data.annotations import CocoFile
from ocvtp.evaluation.tasks.question_files import name_of_2017


class CocoInstances:
    """A COCO `instances` file, by the names of its images.

    Attributes:
        categories: names of all objects, in the file's order.
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
        names = self._coco.categories
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
        try:
            return self._coco.upright_masks(number, self._coco.masked(number), size, turn)
        except ValueError as error:
            raise ValueError(
                f"image {name} cannot be used with {self.path}: {error}; repair the file, or pass "
                "the one that describes the image."
            ) from error
