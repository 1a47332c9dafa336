"""Masks of COCO's annotations: polygons, and run lengths in both spellings.

h x w pixels of the image as the annotation file says.
"""

from __future__ import annotations

from reprlib import repr as shortened
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from ocvtp.images import check_pixels

_FARTHEST = 100
"""Sizes of the image that a polygon may reach from its corner: drawing walks along every edge."""


def has_mask(segmentation: Any) -> bool:
    """Whether there is anything to draw: `[]`, `[[]]`, `{}` and None are an object's box alone."""
    return any(segmentation) if isinstance(segmentation, list) else bool(segmentation)


def read_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """The pixels of an object, [h, w].

    Args:
        segmentation: polygons `[[x, y, x, y, ..], ..]`, or `{"size": [h, w], "counts": ..}` with
            run lengths in columns, the first of them background: a list, or COCO's compressed text.
        height: h.
        width: w.

    Raises:
        ValueError: if it is neither, does not fit the image, or the image has too many pixels.
    """
    check_pixels(width, height)
    if isinstance(segmentation, list):
        return _draw(segmentation, height, width)
    if isinstance(segmentation, dict):
        return _unroll(segmentation, height, width)
    raise ValueError(
        f"segmentation is {shortened(segmentation)}; pass a list of polygons, or size and counts"
    )


def write_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The segmentation of an object's pixels [h, w], in compressed run lengths, for a JSON file."""
    code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode("ascii")}


def _draw(polygons: list[Any], height: int, width: int) -> NDArray[np.bool_]:
    checked = [_polygon(points, max(height, width)) for points in polygons if points != []]
    drawn = rle.decode(rle.merge(rle.frPyObjects(checked, height, width)))
    return np.asarray(drawn, np.bool_)


def _polygon(points: Any, size: int) -> list[float]:
    if not isinstance(points, list):
        raise ValueError(
            f"{shortened(points)} stands where a polygon should; pass a list of lists,"
            " [[x, y, x, y, ...], ...]"
        )
    try:
        numbers = np.array(points, np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"a polygon has something else than numbers ({error})") from error
    if numbers.ndim != 1 or len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(
            f"a polygon is {shortened(points)}; pass x and y of three points or more in one list"
        )
    if not (np.abs(numbers) <= _FARTHEST * size).all():  # nan is not
        raise ValueError("a polygon has points far outside of the image, or nan; repair them")
    return [float(number) for number in numbers]


def _unroll(code: dict[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    if code.get("size") != [height, width]:
        raise ValueError(
            f"its size is {shortened(code.get('size'))}, but the image has [{height}, {width}]"
        )
    runs = _runs(code.get("counts"))
    if runs.sum() != height * width:
        raise ValueError(f"its counts are {runs.sum()} pixels, but the image has {height * width}")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def _runs(counts: Any) -> NDArray[np.int64]:
    runs = _decompressed(counts) if isinstance(counts, str) else counts
    if (
        not isinstance(runs, list)
        or not all(type(run) is int for run in runs)
        or not all(0 <= run < 2**31 for run in runs)
    ):
        raise ValueError(
            f"its counts are {shortened(counts)}; pass run lengths, or COCO's text of them"
        )
    return np.array(runs, np.int64)


def _decompressed(text: str) -> list[int]:
    """Five bits a character, the lowest first; from the fourth on, minus the run two before.

    https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c, rleFrString.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text.encode():
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its counts are {shortened(text)}, which is not COCO's text of runs")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(f"its counts are {shortened(text)}, which ends inside of a number")
    return runs
