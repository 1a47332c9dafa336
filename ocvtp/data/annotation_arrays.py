"""COCO's annotation files, read one entry at a time, checked, and put into arrays.

Of M images, in the file's order,

    image_ids         [M] int64
    image_order       [M] int64, the places of these ids, ascending
    image_sizes       [M, 2] int64, height and width
    image_names       texts, `file_name`

Of A annotations, in the file's order, grouped by `of_image` [A] int64, those of image m from
`of_image_ends[m]` to `of_image_ends[m + 1]`: an `instances` file has

    ids               [A] int64, -1 where there is none
    image_ids_of      [A] int64
    category_ids      [A] int64, -1 where there is none
    is_crowd          [A] uint8
    has_mask          [A] uint8
    areas             [A] float64, nan where there is none
    boxes             [A, 4] float64, nan where there is none
    points            all corners of all polygons, x and y in turn, float64
    polygon_ends      [P + 1] int64, where each polygon starts in `points`, and where the last ends
    polygons_of       [A + 1] int64, the same of the polygons of each annotation
    others            texts, JSON of all else: masks in run lengths, entries of the file's own
    category_numbers  [C] int64, and the texts `category_names`, in the file's order
    no_categories     texts: why the categories cannot be used, or nothing

and a `captions` file `captions`, texts. Texts are two arrays, see `ocvtp.data.mapped_arrays`.
"""

from __future__ import annotations

import json
import os.path
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ocvtp.data.json_parts import json_parts
from ocvtp.data.mapped_arrays import TextArray
from ocvtp.data.masks import has_mask

Arrays = dict[str, NDArray[Any]]
_Add = Callable[[int, Any], None]
_END = 2**63
_CROWD = (0, 1, None)
_OWN = ("id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation")


class Unusable(Exception):
    """What is wrong with an annotation file, as it goes on after `annotation file PATH `."""


class AnnotationReader:
    """Reads a file of one kind.

    Args:
        path: of the file.
        kind: `instances` or `captions`.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind

    def check_there(self) -> None:
        """Find out before anything is made.

        Raises:
            ValueError: if the file is not there.
        """
        if not self.path.is_file():
            raise ValueError(f"annotation file {self.path} does not exist; pass {self._wanted}.")

    def arrays(self) -> Arrays:
        """All of it.

        Raises:
            ValueError: if it is no file of this kind, naming the first entry that is wrong.
        """
        try:
            images, annotations = _Images(), _ANNOTATIONS[self.kind]()
            parts = {"images": images.add, **annotations.parts}
            found: set[str] = set()
            for name, place, entry in self._entries(parts):
                if place:
                    parts[name](place, entry)
                elif name in found:
                    raise Unusable(f"cannot be used: it has two lists {name!r}; make them one.")
                found.add(name)
            for name in ("images", "annotations"):
                if name not in found:
                    self._refuse_kind(f"without a list {name!r}")
            if "categories" in parts and "categories" not in found:
                annotations.no_categories = self._other_kind("without a list 'categories'")
            known = images.arrays()
            return known | annotations.arrays(known)
        except Unusable as error:
            raise ValueError(f"annotation file {self.path} {error}") from error.__cause__
        except RecursionError as error:  # of an entry that is written again
            told = self._other_kind(f"no JSON ({error})")
            raise ValueError(f"annotation file {self.path} {told}") from error

    def _entries(self, names: Mapping[str, Any]) -> Iterator[tuple[str, int, Any]]:
        """See `json_parts`."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise Unusable(f"cannot be read ({error}); make it readable.") from error
        try:
            text = data.decode(json.detect_encoding(data), "surrogatepass")
            del data
            yield from json_parts(text, names)
        except TypeError:
            self._refuse_kind("no JSON object")
        except (ValueError, RecursionError) as error:
            self._refuse_kind(f"no JSON ({error})", error)

    def _refuse_kind(self, found: str, error: BaseException | None = None) -> NoReturn:
        raise Unusable(self._other_kind(found)) from error

    def _other_kind(self, found: str) -> str:
        return f"is {found}, so no COCO {self.kind} file; pass {self._wanted}."

    @property
    def _wanted(self) -> str:
        article = "an" if self.kind[0] in "aeiou" else "a"
        return f"{article} {self.kind}_*.json file"


class _Images:
    """Those that a file lists."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._names: list[str] = []
        self._first: dict[str, int] = {}
        self._sizes = array("q")

    def add(self, place: int, entry: Any) -> None:
        _check_whole(place, entry, "images", ("id", "file_name", "height", "width"))
        number, name = entry["id"], entry["file_name"]
        _check_text(name, f"image {number} has the file_name")
        for side in ("height", "width"):
            pixels = entry[side]
            if type(pixels) is not int or not 1 <= pixels < _END:
                _refuse(
                    f"image {number} ({name}) has the {side} {shortened(pixels)}; pass the "
                    "whole number of its pixels"
                )
            self._sizes.append(pixels)
        if number in self._places:
            same = self._names[self._places[number]]
            _refuse(
                f"two images have the id {number}, {same} and {name}; "
                "list every image once, with its own id"
            )
        other = self._first.setdefault(os.path.normpath(name), number)
        if other != number:
            _refuse(
                f"images {other} and {number} are one file, {name}; list every image once, and "
                "give its annotations that id"
            )
        self._places[number] = len(self._names)
        self._names.append(name)

    def arrays(self) -> Arrays:
        ids = np.fromiter(self._places, np.int64, len(self._places))
        return {
            "image_ids": ids,
            "image_order": np.argsort(ids),
            "image_sizes": np.array(self._sizes, np.int64).reshape(-1, 2),
            **TextArray.of(self._names).arrays("image_names"),
        }


class _Instances:
    """Objects, and the categories that they are of."""

    def __init__(self) -> None:
        self.no_categories = ""
        self._ids, self._of, self._categories_of = array("q"), array("q"), array("q")
        self._is_crowd, self._has_mask = bytearray(), bytearray()
        self._areas, self._boxes, self._points = array("d"), array("d"), array("d")
        self._polygon_ends, self._polygons_of = array("q", [0]), array("q", [0])
        self._others: list[str] = []
        self._categories: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._odd_category: tuple[int, Any] | None = None

    @property
    def parts(self) -> dict[str, _Add]:
        """What takes the entries of each list."""
        return {"annotations": self._add, "categories": self._add_category}

    def _add(self, place: int, entry: Any) -> None:
        """There may be a million: messages are made for faults only."""
        if type(entry) is not dict or "image_id" not in entry:
            _check_keys(entry, f"entry {place} of 'annotations'", ("image_id",))
        get = entry.get
        number = get("id", -place)
        if "id" in entry and not _is_id(number):
            _check_id(number, f"entry {place} of 'annotations' has the id")
        image_id, category = entry["image_id"], get("category_id")
        if not _is_id(image_id):
            _check_id(image_id, f"{_name(number)} has the image_id")
        if "segmentation" not in entry and "bbox" not in entry:
            _refuse(
                f"{_name(number)} lacks segmentation or bbox (it has {', '.join(entry)}); pass "
                "an instances_*.json file"
            )
        if not _is_id(category):
            self._odd_category = self._odd_category or (number, category)
            category = -1
        crowd = get("iscrowd", 0)
        if crowd not in _CROWD:
            _refuse(
                f"{_name(number)} has iscrowd {shortened(crowd)}; pass 0 for an "
                "object, 1 for a crowd"
            )
        self._ids.append(number)
        self._of.append(image_id)
        self._categories_of.append(category)
        self._is_crowd.append(bool(crowd))
        others = {}
        if len(entry) > len(_OWN) or not entry.keys() <= _OWN_SET:
            others = {key: value for key, value in entry.items() if key not in _OWN_SET}
        area = get("area")
        is_area = type(area) in (int, float) and 0 <= area < _END
        self._areas.append(area if is_area else np.nan)
        if not is_area and "area" in entry:
            others["area"] = area
        if not self._add_box(get("bbox")) and "bbox" in entry:
            others["bbox"] = entry["bbox"]
        segmentation = get("segmentation")
        self._has_mask.append(has_mask(segmentation))
        if self._has_mask[-1] and not self._add_polygons(segmentation):
            others["segmentation"] = segmentation
        self._polygons_of.append(len(self._polygon_ends) - 1)
        self._others.append(json.dumps(others) if others else "")

    def _add_box(self, box: Any) -> bool:
        """Add its four numbers; nan, and False, if it is anything else."""
        if type(box) is list and len(box) == 4 and _NUMBERS.issuperset(map(type, box)):
            if all(-_END < number < _END for number in box):
                self._boxes.fromlist(box)
                return True
        self._boxes.extend((np.nan,) * 4)
        return False

    def _add_polygons(self, segmentation: Any) -> bool:
        """Add these polygons, if they are lists of numbers; what they are worth is seen later."""
        if type(segmentation) is not list:
            return False
        points, polygons = len(self._points), len(self._polygon_ends)
        try:
            for polygon in segmentation:
                if polygon != []:
                    self._points.fromlist(polygon)
                    self._polygon_ends.append(len(self._points))
        except (TypeError, OverflowError):
            del self._points[points:], self._polygon_ends[polygons:]
            return False
        return True

    def _add_category(self, place: int, entry: Any) -> None:
        """The first fault is told to those who ask for categories."""
        if self.no_categories:
            return
        try:
            self._check_category(place, entry)
        except Unusable as error:
            self.no_categories = str(error)

    def _check_category(self, place: int, entry: Any) -> None:
        _check_whole(place, entry, "categories", ("id", "name"))
        number, name = entry["id"], entry["name"]
        _check_text(name, f"category {number} has the name")
        if number in self._categories:
            _refuse(
                f"two categories have the id {number}, {self._categories[number]!r} and {name!r}; "
                "give each its own"
            )
        same = self._numbers.setdefault(name.strip().casefold(), number)
        if same != number:
            _refuse(
                f"categories {same} and {number} are both called {name!r}; make them one, or "
                "call them by different names"
            )
        self._categories[number] = name

    def arrays(self, images: Arrays) -> Arrays:
        ids, of = _numbers(self._ids), _numbers(self._of)
        _check_alone(ids)
        found = _by_image(of, images, lambda place: _name(int(ids[place])))
        categories = np.fromiter(self._categories, np.int64, len(self._categories))
        categories_of = _numbers(self._categories_of)
        if not self.no_categories:
            self._check_categories(ids, categories_of, categories)
        return found | {
            "ids": ids.clip(min=-1),
            "image_ids_of": of,
            "category_ids": categories_of,
            "is_crowd": np.frombuffer(bytes(self._is_crowd), np.uint8),
            "has_mask": np.frombuffer(bytes(self._has_mask), np.uint8),
            "areas": np.array(self._areas, np.float64),
            "boxes": np.array(self._boxes, np.float64).reshape(-1, 4),
            "points": np.array(self._points, np.float64),
            "polygon_ends": _numbers(self._polygon_ends),
            "polygons_of": _numbers(self._polygons_of),
            **TextArray.of(self._others).arrays("others"),
            "category_numbers": categories,
            **TextArray.of(self._categories.values()).arrays("category_names"),
            **TextArray.of([self.no_categories]).arrays("no_categories"),
        }

    def _check_categories(
        self, ids: NDArray[np.int64], of: NDArray[np.int64], listed: NDArray[np.int64]
    ) -> None:
        try:
            odd = self._odd_category
            unlisted = np.flatnonzero(~np.isin(of, listed))
            if not len(unlisted):
                return
            number = int(ids[unlisted[0]])
            if odd is not None and number == odd[0]:
                _check_id(odd[1], f"{_name(number)} has the category_id")
            _refuse_unlisted(_name(number), "category", int(of[unlisted[0]]))
        except Unusable as error:
            self.no_categories = str(error)


class _Captions:
    """What is said of images."""

    def __init__(self) -> None:
        self.no_categories = ""
        self._of = array("q")
        self._captions: list[str] = []

    @property
    def parts(self) -> dict[str, _Add]:
        """What takes the entries of each list."""
        return {"annotations": self._add}

    def _add(self, place: int, entry: Any) -> None:
        where = f"entry {place} of 'annotations'"
        _check_keys(entry, where, ("image_id", "caption"))
        _check_id(entry["image_id"], f"{where} has the image_id")
        _check_text(entry["caption"], f"{where} has the caption")
        self._of.append(entry["image_id"])
        self._captions.append(entry["caption"].strip())

    def arrays(self, images: Arrays) -> Arrays:
        found = _by_image(_numbers(self._of), images, lambda place: _name(-1 - place))
        return found | TextArray.of(self._captions).arrays("captions")


_ANNOTATIONS: dict[str, type[_Instances] | type[_Captions]] = {
    "instances": _Instances,
    "captions": _Captions,
}
_OWN_SET = frozenset(_OWN)
_NUMBERS = frozenset({int, float})


def _by_image(
    of: NDArray[np.int64], images: Arrays, name: Callable[[int], str]
) -> dict[str, NDArray[Any]]:
    """The annotations of every image, by the numbers of their images."""
    ids, order = images["image_ids"], images["image_order"]
    unlisted = np.flatnonzero(~np.isin(of, ids))
    if len(unlisted):
        _refuse_unlisted(name(int(unlisted[0])), "image", int(of[unlisted[0]]))
    places = order[np.searchsorted(ids, of, sorter=order)]
    counts = np.bincount(places, minlength=len(ids))
    return {
        "of_image": np.argsort(places, kind="stable"),
        "of_image_ends": np.concatenate([[0], counts.cumsum()]).astype(np.int64),
    }


def _check_alone(ids: NDArray[np.int64]) -> None:
    order = np.argsort(ids, kind="stable")
    again = order[1:][np.diff(ids[order]) == 0]
    if len(again):
        _refuse(
            f"two annotations have the id {ids[again.min()]}; list every object once, with its own"
            " id"
        )


def _numbers(values: array[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _refuse(what: str) -> NoReturn:
    raise Unusable(f"cannot be used: {what}.")


def _refuse_unlisted(name: str, what: str, there: int) -> NoReturn:
    _refuse(
        f"{name} is of {what} {there}, which the file does not list; "
        f"list it, correct the {what}_id, or take the annotation out"
    )


def _check_whole(place: int, entry: Any, part: str, keys: tuple[str, ...]) -> None:
    """An entry of a list has the keys, and a number as its id."""
    _check_keys(entry, f"entry {place} of {part!r}", keys)
    _check_id(entry["id"], f"entry {place} of {part!r} has the id")


def _check_keys(entry: Any, where: str, keys: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        _refuse(f"{where} is {shortened(entry)}; pass a JSON object")
    lacking = [key for key in keys if key not in entry]
    if lacking:
        has = ", ".join(entry) or "nothing"
        _refuse(f"{where} lacks {', '.join(lacking)} (it has {has}); add what is missing")


def _check_id(number: Any, where: str) -> None:
    if not _is_id(number):
        _refuse(
            f"{where} {shortened(number)}; ids are whole numbers from 0 on, of 63 bits: number "
            "what is listed, and use these numbers wherever it is referred to"
        )


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        _refuse(f"{where} {shortened(text)}; pass a text")


def _is_id(number: Any) -> bool:
    return type(number) is int and 0 <= number < _END


def _name(number: int) -> str:
    """What messages call an annotation: its id, or minus its place where it has none."""
    return f"annotation {number}" if number >= 0 else f"entry {-number} of 'annotations'"
