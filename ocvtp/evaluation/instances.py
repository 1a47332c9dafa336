"""What is in COCO's images: the objects of each, and their masks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from ocvtp.evaluation.listed import name_of_2017

_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "segmentation"),
    "categories": ("id", "name"),
}


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
        ValueError: if it is missing or no `instances` file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = _read(self.path)
        self.categories: list[str] = [entry["name"] for entry in content["categories"]]
        self.image_ids: dict[str, int] = {e["file_name"]: e["id"] for e in content["images"]}
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        self._coco = COCO()
        self._coco.imgs = {entry["id"]: entry for entry in content["images"]}
        self._of_image: dict[int, list[dict[str, Any]]] = {n: [] for n in self._coco.imgs}
        self._later_names = {name_of_2017(name): n for name, n in self.image_ids.items()}
        for entry in content["annotations"]:
            if entry["image_id"] not in self._of_image or entry["category_id"] not in names:
                raise ValueError(
                    f"{self.path}: an annotation is of image {entry['image_id']} and category "
                    f"{entry['category_id']}, which the file does not list; repair the file."
                )
            self._of_image[entry["image_id"]].append(entry)
        self.present: Mapping[str, list[str]] = {
            name: list(dict.fromkeys(names[e["category_id"]] for e in self._of_image[number]))
            for name, number in self.image_ids.items()
        }

    def masks(self, name: str, size: tuple[int, int]) -> NDArray[np.bool_] | None:
        """[O, H, W] masks of an image's objects, without crowds; None where it is not listed.

        Args:
            name: of the image, COCO's of 2014 or of 2017.
            size: (W, H), pixels of the image as it is stored; masks of an image that was resized
                are brought to it.

        Raises:
            ValueError: if a mask is unreadable, or the image has another shape.
        """
        number = self._later_names.get(name_of_2017(name))
        if number is None:
            return None
        listed = self._coco.imgs[number]
        width, height = listed["width"], listed["height"]
        if abs(height * size[0] - width * size[1]) > height + width:
            raise ValueError(
                f"image {name} is {size[0]}x{size[1]}, but {self.path} says {width}x{height}; pass "
                "the images that the file describes."
            )
        objects = [e for e in self._of_image[number] if not e.get("iscrowd", 0)]
        masks = [self._mask(entry).resize(size, Image.Resampling.NEAREST) for entry in objects]
        return np.array(masks, np.bool_).reshape(-1, size[1], size[0])

    def _mask(self, entry: dict[str, Any]) -> Image.Image:
        try:
            return Image.fromarray(self._coco.annToMask(entry))
        except Exception as error:  # pycocotools raises bare Exception, TypeError, KeyError, ...
            raise ValueError(
                f"{self.path}: an annotation of image {entry['image_id']} has no readable mask "
                f"({error}); repair the file."
            ) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pass an instances_*.json file.")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); pass an instances_*.json file.") from error
    for part, keys in _KEYS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path} has no list {part!r}; pass an instances_*.json file.")
        for entry in entries:
            lacking = [k for k in keys if not isinstance(entry, dict) or k not in entry]
            if lacking:
                raise ValueError(
                    f"{path}: an entry of {part!r} lacks {', '.join(lacking)}; pass an "
                    "instances_*.json file."
                )
    return content  # type: ignore[no-any-return]
