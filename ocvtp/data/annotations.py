"""COCO `instances` and `captions` files: the one place where they are read and checked.

h x w are the pixels of an image as the file says.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.data.masks import has_mask, read_mask

Entry = dict[str, Any]


class CocoFile:
    """A COCO `instances` file: its images, and what is annotated in them.

    Ids are whole numbers from 0 on, and everything that is listed has its own; every annotation is
    of an image that is listed. Objects may have no mask: boxes alone say what is there. Boxes,
    licences and everything else in the file are not read.

    Attributes:
        path: of the file.
        images: entries by id, in the file's order; each has `file_name`, `height` and `width`.
        categories: names by id, in the file's order; empty where they were not asked for.
        num_objects: annotations, crowds left out. num_masks: those of them that have a mask.

    Args:
        path: of the file.
        with_categories: whether the names of objects are needed.

    Raises:
        ValueError: if it is missing or no `instances` file, naming the first entry that is wrong.
    """

    kind: ClassVar[str] = "instances"

    def __init__(self, path: str | Path, with_categories: bool = False) -> None:
        self.path = Path(path)
        content = self._content()
        self.images: Mapping[int, Entry] = self._checked_images(self._list(content, "images"))
        self.categories: Mapping[int, str] = {}
        if with_categories:
            self.categories = self._checked_categories(self._list(content, "categories"))
        self.num_objects = self.num_masks = 0
        self._of_image: dict[int, list[Entry]] = {}
        self._read_annotations(self._list(content, "annotations"), with_categories)

    def objects(self, image_id: int) -> list[Entry]:
        """The annotations of an image, crowds too, in the file's order."""
        return self._of_image.get(image_id, [])

    def masked(self, image_id: int) -> list[Entry]:
        """Those that have a mask; without crowds."""
        return [e for e in self.objects(image_id) if _is_object(e) and _has_mask(e)]

    def all_masked(self, image_id: int) -> bool:
        """Whether every object of an image has a mask; crowds do not count."""
        return all(_has_mask(entry) for entry in self.objects(image_id) if _is_object(entry))

    def mask(self, entry: Entry) -> NDArray[np.bool_]:
        """The pixels of an annotation, [h, w].

        Raises:
            ValueError: if it has no readable mask.
        """
        image = self.images[entry["image_id"]]
        try:
            return read_mask(entry["segmentation"], image["height"], image["width"])
        except Exception as error:  # pycocotools raises bare Exception, TypeError, KeyError, ...
            number = entry.get("id", f"of image {entry['image_id']}")
            raise ValueError(f"annotation {number} has no readable mask ({error})") from error

    def upright_masks(
        self,
        image_id: int,
        entries: Sequence[Entry],
        size: tuple[int, int],
        turn: Image.Transpose | None = None,
    ) -> NDArray[np.bool_]:
        """[O, H, W] masks of annotations of an image, on its upright picture.

        Args:
            image_id: of the image. entries: those annotations, which have masks.
            size: (W, H), pixels of the image as it is stored; masks of an image that was resized
                are brought to it.
            turn: what turns the stored image upright, and the masks with it.

        Raises:
            ValueError: if a mask is unreadable, or the image has another shape.
        """
        self.check_shape(image_id, size)
        masks = [self.mask(entry) for entry in entries]
        blank = Image.new("1", size)  # for the size of no masks
        found = [Image.fromarray(mask).resize(size, Image.Resampling.NEAREST) for mask in masks]
        if turn is not None:
            blank, found = blank.transpose(turn), [mask.transpose(turn) for mask in found]
        return np.array(found, np.bool_).reshape(-1, blank.height, blank.width)

    def check_shape(self, image_id: int, size: tuple[int, int]) -> None:
        """Refuse an image that masks do not fit; it may have been resized.

        Args:
            image_id: of the image.
            size: (width, height) of it as it is stored.

        Raises:
            ValueError: if it is of another shape than the file says.
        """
        width, height = self.images[image_id]["width"], self.images[image_id]["height"]
        if abs(height * size[0] - width * size[1]) > height + width:
            turned = abs(width * size[0] - height * size[1]) <= height + width
            why = ": it may lie on its side, then save it as it was annotated" if turned else ""
            raise ValueError(
                f"it is {size[0]}x{size[1]}, but {self.path} says {width}x{height}, which is "
                f"another shape: the masks do not fit{why}"
            )

    def _content(self) -> Entry:
        if not self.path.is_file():
            raise ValueError(f"annotation file {self.path} does not exist; pass {self._wanted}.")
        try:
            content = json.loads(self.path.read_bytes())
        except OSError as error:
            raise ValueError(
                f"annotation file {self.path} cannot be read ({error}); make it readable."
            ) from error
        except (ValueError, RecursionError) as error:
            self._not_instances(f"no JSON ({error})", error)
        if not isinstance(content, dict):
            self._not_instances("no JSON object")
        return content

    def _list(self, content: Entry, name: str) -> list[Any]:
        entries = content.get(name)
        if not isinstance(entries, list):
            self._not_instances(f"without a list {name!r}")
        return entries

    def _not_instances(self, found: str, error: BaseException | None = None) -> NoReturn:
        raise ValueError(
            f"annotation file {self.path} is {found}, so no COCO {self.kind} file; pass "
            f"{self._wanted}."
        ) from error

    @property
    def _wanted(self) -> str:
        article = "an" if self.kind[0] in "aeiou" else "a"
        return f"{article} {self.kind}_*.json file"

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"annotation file {self.path} cannot be used: {what}.")

    def _checked_images(self, entries: list[Any]) -> dict[int, Entry]:
        images: dict[int, Entry] = {}
        names: dict[str, int] = {}
        for entry in self._whole(entries, "images", ("id", "file_name", "height", "width")):
            number, name = entry["id"], entry["file_name"]
            self._check_text(name, f"image {number} has the file_name")
            for side in ("height", "width"):
                pixels = entry[side]
                if type(pixels) is not int or pixels < 1:
                    self._refuse(
                        f"image {number} ({name}) has the {side} {shortened(pixels)}; pass the "
                        "whole number of its pixels"
                    )
            if number in images:
                self._refuse(
                    f"two images have the id {number}, {images[number]['file_name']} and {name}; "
                    "list every image once, with its own id"
                )
            same = names.setdefault(os.path.normpath(name), number)
            if same != number:
                self._refuse(
                    f"images {same} and {number} are one file, {name}; list every image once, and "
                    "give its annotations that id"
                )
            images[number] = entry
        return images

    def _checked_categories(self, entries: list[Any]) -> dict[int, str]:
        categories: dict[int, str] = {}
        numbers: dict[str, int] = {}
        for entry in self._whole(entries, "categories", ("id", "name")):
            number, name = entry["id"], entry["name"]
            self._check_text(name, f"category {number} has the name")
            if number in categories:
                self._refuse(
                    f"two categories have the id {number}, {categories[number]!r} and {name!r}; "
                    "give each its own"
                )
            same = numbers.setdefault(name.strip().casefold(), number)
            if same != number:
                self._refuse(
                    f"categories {same} and {number} are both called {name!r}; make them one, or "
                    "call them by different names"
                )
            categories[number] = name
        return categories

    def _whole(self, entries: list[Any], part: str, keys: tuple[str, ...]) -> Iterator[Entry]:
        """The entries of a list, if each has the keys and a number as its id."""
        for place, entry in enumerate(entries, start=1):
            self._check_keys(entry, f"entry {place} of {part!r}", keys)
            self._check_id(entry["id"], f"entry {place} of {part!r} has the id")
            yield entry

    def _check_keys(self, entry: Any, where: str, keys: tuple[str, ...]) -> None:
        if not isinstance(entry, dict):
            self._refuse(f"{where} is {shortened(entry)}; pass a JSON object")
        lacking = [key for key in keys if key not in entry]
        if lacking:
            has = ", ".join(entry) or "nothing"
            self._refuse(f"{where} lacks {', '.join(lacking)} (it has {has}); add what is missing")

    def _check_id(self, number: Any, where: str) -> None:
        if not _is_id(number):
            self._refuse(
                f"{where} {shortened(number)}; ids are whole numbers from 0 on: number what is "
                "listed, and use these numbers wherever it is referred to"
            )

    def _check_text(self, text: Any, where: str) -> None:
        if not isinstance(text, str) or not text.strip():
            self._refuse(f"{where} {shortened(text)}; pass a text")

    def _read_annotations(self, entries: list[Any], with_categories: bool) -> None:
        """Keep them by image. There may be a million: messages are made for faults only."""
        seen: set[int] = set()
        for place, entry in enumerate(entries, start=1):
            if not isinstance(entry, dict) or "image_id" not in entry:
                self._check_keys(entry, f"entry {place} of 'annotations'", ("image_id",))
            if "id" in entry and not _is_id(entry["id"]):
                self._check_id(entry["id"], f"entry {place} of 'annotations' has the id")
            number = entry.get("id", -place)
            if number in seen:
                self._refuse(
                    f"two annotations have the id {number}; list every object once, with its own id"
                )
            seen.add(number)
            self._check_refers(entry, number, "image_id", self.images)
            if "segmentation" not in entry and "bbox" not in entry:
                self._refuse(
                    f"{_name(number)} lacks segmentation or bbox (it has {', '.join(entry)}); pass "
                    "an instances_*.json file"
                )
            if with_categories:
                self._check_refers(entry, number, "category_id", self.categories)
            if entry.get("iscrowd", 0) not in _CROWD:
                self._refuse(
                    f"{_name(number)} has iscrowd {shortened(entry['iscrowd'])}; pass 0 for an "
                    "object, 1 for a crowd"
                )
            self._of_image.setdefault(entry["image_id"], []).append(entry)
            if _is_object(entry):
                self.num_objects += 1
                self.num_masks += _has_mask(entry)

    def _check_refers(self, entry: Entry, number: int, key: str, listed: Mapping[int, Any]) -> None:
        there = entry.get(key)
        if type(there) is not int or there not in listed:
            self._check_id(there, f"{_name(number)} has the {key}")
            what = key.removesuffix("_id")
            self._refuse(
                f"{_name(number)} is of {what} {there}, which the file does not list; "
                f"list it, correct the {key}, or take the annotation out"
            )


class CaptionFile(CocoFile):
    """A COCO `captions` file: its images, and what is said of them.

    Attributes:
        captions: of each image by its id, in the file's order; of those alone that have any.

    Args:
        path: of the file.

    Raises:
        ValueError: if it is missing or no `captions` file, naming the first entry that is wrong.
    """

    kind: ClassVar[str] = "captions"

    def __init__(self, path: str | Path) -> None:
        self.captions: dict[int, list[str]] = {}
        super().__init__(path)

    def _read_annotations(self, entries: list[Any], with_categories: bool) -> None:
        del with_categories
        for place, entry in enumerate(entries, start=1):
            self._check_keys(entry, f"entry {place} of 'annotations'", ("image_id", "caption"))
            self._check_refers(entry, -place, "image_id", self.images)
            self._check_text(entry["caption"], f"entry {place} of 'annotations' has the caption")
            self.captions.setdefault(entry["image_id"], []).append(entry["caption"].strip())


_CROWD = (0, 1, None)


def _is_id(number: Any) -> bool:
    return type(number) is int and number >= 0


def _name(number: int) -> str:
    """What messages call an annotation: its id, or minus its place where it has none."""
    return f"annotation {number}" if number >= 0 else f"entry {-number} of 'annotations'"


def _is_object(entry: Entry) -> bool:
    return not entry.get("iscrowd", 0)


def _has_mask(entry: Entry) -> bool:
    return has_mask(entry.get("segmentation"))
