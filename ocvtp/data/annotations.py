"""COCO `instances` and `captions` files: the one place where they are read and checked.

A file is read once and kept as arrays that all processes share, see `ocvtp.data.annotation_arrays`
and `ocvtp.data.mapped_arrays`. h x w are the pixels of an image as the file says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.data.annotation_arrays import AnnotationReader
from ocvtp.data.mapped_arrays import MappedArrays, TextArray, kept_arrays
from ocvtp.data.masks import read_mask

Entry = Mapping[str, Any]


class CocoImageList(Mapping[int, Entry]):
    """The images of a file by their ids: `id`, `file_name`, `height` and `width` of each.

    Args:
        arrays: see `ocvtp.data.annotation_arrays`.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._ids, self._order = arrays["image_ids"], arrays["image_order"]
        self._sizes = arrays["image_sizes"]
        self._names = TextArray.named(arrays, "image_names")

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids.tolist())

    def __getitem__(self, image_id: int) -> Entry:
        place = self.place(image_id)
        if place is None:
            raise KeyError(image_id)
        height, width = self._sizes[place].tolist()
        name = self._names[place]
        return {"id": image_id, "file_name": name, "height": height, "width": width}

    def place(self, image_id: int) -> int | None:
        """Which one of the file it is, from 0; None for an id that is not listed."""
        ordered = int(np.searchsorted(self._ids, image_id, sorter=self._order))
        if ordered == len(self._ids) or self._ids[self._order[ordered]] != image_id:
            return None
        return int(self._order[ordered])

    def names_by_id(self, limit: int | None = None) -> ImageNames:
        """Ids and names in the order of the ids, the first `limit` of them."""
        return ImageNames(self._ids, self._names, self._order[:limit])


class ImageNames(Sequence[tuple[int, str]]):
    """Ids and file names of images, in arrays.

    Args:
        ids: [M]. names: M of them. order: which of them, in which order.
    """

    def __init__(self, ids: NDArray[np.int64], names: TextArray, order: NDArray[np.int64]) -> None:
        self._ids, self._names, self._order = ids, names, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ImageNames(self._ids, self._names, self._order[index])
        place = self._order[index]
        return int(self._ids[place]), self._names[place]


class Annotation(Entry):
    """An entry of `annotations`, made of the arrays when it is read.

    Args:
        file: that it is of. place: of it in the file, from 0.
    """

    __slots__ = ("_file", "_place")

    def __init__(self, file: MappedArrays, place: int) -> None:
        self._file, self._place = file, place

    def _others(self) -> dict[str, Any]:
        text = TextArray.named(self._file, "others")[self._place]
        others: dict[str, Any] = json.loads(text) if text else {}
        return others

    def __getitem__(self, key: str) -> Any:
        if key in _READ:
            found = _READ[key](self._file, self._place)
            if found is not None:
                return found
        return self._others()[key]

    def __iter__(self) -> Iterator[str]:
        own = (key for key, read in _READ.items() if read(self._file, self._place) is not None)
        return iter(dict.fromkeys((*own, *self._others())))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _segmentation(file: MappedArrays, place: int) -> list[list[float]] | None:
    first, end = file["polygons_of"][place : place + 2].tolist()
    ends, points = file["polygon_ends"][first : end + 1].tolist(), file["points"]
    return [points[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)] or None


def _whole(name: str) -> Any:
    def read(file: MappedArrays, place: int) -> int | None:
        number = int(file[name][place])
        return None if number < 0 else number

    return read


def _area(file: MappedArrays, place: int) -> float | None:
    area = float(file["areas"][place])
    return None if np.isnan(area) else area


def _box(file: MappedArrays, place: int) -> list[float] | None:
    box: list[float] = file["boxes"][place].tolist()
    return None if np.isnan(box[0]) else box


_READ: dict[str, Any] = {
    "segmentation": _segmentation,
    "area": _area,
    "iscrowd": _whole("is_crowd"),
    "image_id": _whole("image_ids_of"),
    "bbox": _box,
    "category_id": _whole("category_ids"),
    "id": _whole("ids"),
}


class CocoFile:
    """A COCO `instances` file: its images, and what is annotated in them.

    Ids are whole numbers from 0 on, and everything that is listed has its own; every annotation is
    of an image that is listed. Objects may have no mask: boxes alone say what is there. A file of
    a mebibyte and more is read once, and kept beside it as arrays, see
    `ocvtp.data.mapped_arrays`.

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
        reader = AnnotationReader(self.path, self.kind)
        reader.check_there()
        self._arrays = kept_arrays(self.path, self.kind, reader.arrays)
        self.images = CocoImageList(self._arrays)
        self.categories: Mapping[int, str] = {}
        self.num_objects = self.num_masks = 0
        self._open(with_categories)

    def _open(self, with_categories: bool) -> None:
        """What there is beside the images."""
        if with_categories:
            self.categories = self._checked_categories()
        is_object = self._arrays["is_crowd"] == 0
        self.num_objects = int(is_object.sum())
        self.num_masks = int(self._arrays["has_mask"][is_object].sum())

    def objects(self, image_id: int) -> list[Entry]:
        """The annotations of an image, crowds too, in the file's order."""
        return [Annotation(self._arrays, place) for place in self._of_image(image_id).tolist()]

    def masked(self, image_id: int) -> list[Entry]:
        """Those that have a mask; without crowds."""
        places = self._objects_of(image_id)
        with_mask = places[self._arrays["has_mask"][places] == 1]
        return [Annotation(self._arrays, place) for place in with_mask.tolist()]

    def all_masked(self, image_id: int) -> bool:
        """Whether every object of an image has a mask; crowds do not count."""
        return bool(self._arrays["has_mask"][self._objects_of(image_id)].all())

    def _of_image(self, image_id: int) -> NDArray[np.int64]:
        """Places of the annotations of an image."""
        image = self.images.place(image_id)
        if image is None:
            return np.empty(0, np.int64)
        first, end = self._arrays["of_image_ends"][image : image + 2].tolist()
        places: NDArray[np.int64] = self._arrays["of_image"][first:end]
        return places

    def _objects_of(self, image_id: int) -> NDArray[np.int64]:
        """Without crowds."""
        places = self._of_image(image_id)
        found: NDArray[np.int64] = places[self._arrays["is_crowd"][places] == 0]
        return found

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

    def _checked_categories(self) -> dict[int, str]:
        if refused := TextArray.named(self._arrays, "no_categories")[0]:
            raise ValueError(f"annotation file {self.path} {refused}")
        numbers = self._arrays["category_numbers"].tolist()
        names = TextArray.named(self._arrays, "category_names")
        return {number: names[place] for place, number in enumerate(numbers)}


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
        self.captions: Mapping[int, list[str]] = {}
        super().__init__(path)

    def _open(self, with_categories: bool) -> None:
        del with_categories
        self.captions = _Captions(self)


class _Captions(Mapping[int, list[str]]):
    """What is said of the images of a file."""

    def __init__(self, file: CaptionFile) -> None:
        self._file = file
        self._texts = TextArray.named(file._arrays, "captions")

    def __getitem__(self, image_id: int) -> list[str]:
        places = self._file._of_image(image_id).tolist()
        if not places:
            raise KeyError(image_id)
        return [self._texts[place] for place in places]

    def __iter__(self) -> Iterator[int]:
        return (number for number in self._file.images if len(self._file._of_image(number)))

    def __len__(self) -> int:
        return int((np.diff(self._file._arrays["of_image_ends"]) > 0).sum())
