"""Objects cut out of COCO's images along their masks, and the categories that have enough of them.

C are the categories.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.data.annotations import CocoFile
from ocvtp.images import IMAGE_ERRORS, read_image

SPLITS = {"train": "train2017", "test": "val2017"}
"""COCO's own: nothing is cut for training out of an image that is tested on."""


@dataclass(frozen=True)
class CutoutRule:
    """Which objects are cut out, and which categories are used.

    An object is cut out if it is no crowd, is as large as this, and fills so much of its box.
    What counts for a category are images: the cut-outs of one are near copies of each other.

    Args:
        least_side: pixels of the longer side of its box.
        least_area: pixels of its mask.
        least_fill: part of its box.
        least_train: images of train2017 with cut-outs of a category that it is used from.
        least_test: the same in val2017.
        most: cut-outs of each category that are used; the first ones of the file.
        most_side: pixels of the longer side that a cut-out is stored with.
    """

    least_side: int = 48
    least_area: int = 1000
    least_fill: float = 0.3
    least_train: int = 7
    least_test: int = 1
    most: int = 50
    most_side: int = 256


@dataclass(frozen=True, eq=False)
class Cutout:
    """An object with what surrounds it in its box.

    Args:
        category: COCO's name.
        pixels: [h, w, 3] uint8.
        mask: [h, w] bool.
    """

    category: str
    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Cutouts:
    """The cut-outs of one split.

    Args:
        by_category: of each category that is used, in the file's order.
        together: [C, C] images of train2017 that have both categories; 0 on the diagonal.
    """

    by_category: Mapping[str, Sequence[Cutout]]
    together: NDArray[np.int64]

    @property
    def categories(self) -> tuple[str, ...]:
        """Names, in the file's order."""
        return tuple(self.by_category)


def cut_out(root: str | Path, rule: CutoutRule) -> dict[str, Cutouts]:
    """Cut objects out of both splits of a folder in COCO's layout.

    Args:
        root: has `train2017`, `val2017` and `annotations/instances_*2017.json`.
        rule: which ones.

    Returns:
        `train` and `test`, of the same categories.

    Raises:
        ValueError: if a file is missing or broken, or less than two categories have enough.
    """
    files = {split: _annotations(root, name) for split, name in SPLITS.items()}
    found, shown = {}, {}
    for split, name in SPLITS.items():
        found[split], shown[split] = _cut(Path(root) / name, files[split], rule)
    least = {"train": rule.least_train, "test": rule.least_test}
    names = [
        name
        for name in files["train"].categories.values()
        if all(shown[split][name] >= least[split] for split in SPLITS)
    ]
    if len(names) < 2:
        raise ValueError(
            f"{root} has {len(names)} categories with cut-outs from {rule.least_train} images of"
            f" train2017 and {rule.least_test} of val2017; pass a larger part of COCO, or a laxer"
            " rule."
        )
    together = _counts_together(files["train"], names)
    return {
        split: Cutouts({name: tuple(found[split][name]) for name in names}, together)
        for split in SPLITS
    }


def _annotations(root: str | Path, name: str) -> CocoFile:
    return CocoFile(Path(root) / "annotations" / f"instances_{name}.json", with_categories=True)


def _cut(
    images: Path, file: CocoFile, rule: CutoutRule
) -> tuple[dict[str, list[Cutout]], Counter[str]]:
    """By category: the cut-outs, and how many images they are from."""
    found: dict[str, list[Cutout]] = {name: [] for name in file.categories.values()}
    shown: Counter[str] = Counter()
    for number, entry in file.images.items():
        image: NDArray[np.uint8] | None = None
        before = {name: len(cutouts) for name, cutouts in found.items()}
        for annotation in file.masked(number):
            cutouts = found[file.categories[annotation["category_id"]]]
            if len(cutouts) >= rule.most:
                continue
            mask = file.mask(annotation)
            box = usable_box(mask, rule)
            if box is None:
                continue
            if image is None:
                image = _read(images / entry["file_name"], file, number)
            name = file.categories[annotation["category_id"]]
            cutouts.append(_shrunk(Cutout(name, image[box], mask[box]), rule.most_side))
        shown.update(name for name, cutouts in found.items() if len(cutouts) > before[name])
    return found, shown


def _read(path: Path, file: CocoFile, number: int) -> NDArray[np.uint8]:
    entry = file.images[number]
    try:
        image = read_image(path, upright=False)
        file.check_shape(number, image.size)
    except IMAGE_ERRORS as error:
        raise ValueError(f"image {path} cannot be used ({error}); replace the file.") from error
    return np.asarray(image.resize((entry["width"], entry["height"])))


def usable_box(mask: NDArray[np.bool_], rule: CutoutRule) -> tuple[slice, slice] | None:
    """The box of an object, [h, w], that is cut out; None where it is not."""
    if mask.sum() < rule.least_area:
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    sides = (bottom - top, right - left)
    full = mask.sum() >= rule.least_fill * sides[0] * sides[1]
    if max(sides) < rule.least_side or not full:
        return None
    return slice(top, bottom), slice(left, right)


def _shrunk(cutout: Cutout, most_side: int) -> Cutout:
    height, width = cutout.mask.shape
    share = most_side / max(height, width)
    if share >= 1:
        return Cutout(cutout.category, cutout.pixels.copy(), cutout.mask.copy())
    size = (max(1, round(share * width)), max(1, round(share * height)))
    pixels = Image.fromarray(cutout.pixels).resize(size, Image.Resampling.LANCZOS)
    mask = Image.fromarray(cutout.mask.astype(np.uint8) * 255).resize(size)
    return Cutout(cutout.category, np.asarray(pixels), np.asarray(mask) >= 128)


def _counts_together(file: CocoFile, names: Sequence[str]) -> NDArray[np.int64]:
    counts = np.zeros((len(names), len(names)), np.int64)
    for number in file.images:
        there = {file.categories[entry["category_id"]] for entry in file.objects(number)}
        for one, other in combinations([n for n, name in enumerate(names) if name in there], 2):
            counts[one, other] += 1
            counts[other, one] += 1
    return counts
