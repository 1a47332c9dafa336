"""Questions whose answer is a box: where is an object that only one description fits?

Boxes are x1, y1, x2, y2: the left, upper, right and lower edge, in pixels of the upright image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from ocvtp.data.annotations import Entry
from ocvtp.data.questions import Thing

Box = tuple[float, float, float, float]
OBJECT = "{object}"
PROMPT = "Where is the {object}? Answer with its box."
"""What is asked, where nobody says otherwise; {object} stands for what is looked for."""
SIZES = {"small": 32**2, "medium": 96**2}
"""COCO's: the area below which an object is of a size; others are `large`."""
_DESCRIPTIONS = (("colour", "shape"), ("size", "colour", "shape"))


class Boxed(Thing, Protocol):
    """An object of a drawn scene, e.g. a `SceneObject`."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Its x, y, width and height in pixels."""


@dataclass(frozen=True)
class Sought:
    """An object to be found.

    Args:
        name: what it alone is called, e.g. `red circle`.
        box: where it is. size: `small` or `large`, and what else its kind may be.
    """

    name: str
    box: Box
    size: str = ""


def corners(box: Sequence[float]) -> Box:
    """COCO's x, y, width and height as x1, y1, x2, y2."""
    x, y, width, height = (float(number) for number in box)
    return x, y, x + width, y + height


def seek(objects: Sequence[Boxed], num: int, rng: np.random.Generator) -> list[Sought]:
    """Different objects of a scene to ask for, each by a description that fits no other.

    Colour and shape; the size too where those do not tell it apart. There may be less than `num`,
    even none.

    Args:
        objects: of the scene. num: at most so many. rng: which, and in what order.
    """
    named: dict[int, str] = {}
    for words in _DESCRIPTIONS:
        said = [" ".join(getattr(item, word) for word in words) for item in objects]
        times = Counter(said)
        for number, name in enumerate(said):
            if times[name] == 1:
                named.setdefault(number, name)
    order = rng.permutation(sorted(named))[:num].tolist()
    return [Sought(named[n], corners(objects[n].box), objects[n].size) for n in order]


def coco_sought(entries: Sequence[Entry], names: Mapping[int, str]) -> list[Sought]:
    """What an image of COCO has just one of, crowds counted too, and a box of.

    Args:
        entries: the annotations of the image. names: of the categories, by id.
    """
    times = Counter(entry["category_id"] for entry in entries)
    found = []
    for entry in entries:
        box = entry.get("bbox")
        if times[entry["category_id"]] > 1 or entry.get("iscrowd") or not box:
            continue
        if min(box[2:]) > 0:
            area = entry.get("area") or box[2] * box[3]
            size = next((size for size, most in SIZES.items() if area < most), "large")
            found.append(Sought(names[entry["category_id"]], corners(box), size))
    return found


def turned(box: Box, size: tuple[int, int], turn: Image.Transpose | None) -> Box:
    """A box on an image that was turned.

    Args:
        box: on the image as it is stored. size: its width and height.
        turn: what turns it upright; None: nothing.
    """
    if turn is None:
        return box
    width, height = size
    places = {
        Image.Transpose.FLIP_LEFT_RIGHT: lambda x, y: (width - x, y),
        Image.Transpose.FLIP_TOP_BOTTOM: lambda x, y: (x, height - y),
        Image.Transpose.ROTATE_90: lambda x, y: (y, width - x),
        Image.Transpose.ROTATE_180: lambda x, y: (width - x, height - y),
        Image.Transpose.ROTATE_270: lambda x, y: (height - y, x),
        Image.Transpose.TRANSPOSE: lambda x, y: (y, x),
        Image.Transpose.TRANSVERSE: lambda x, y: (height - y, width - x),
    }
    (ax, ay), (bx, by) = places[turn](*box[:2]), places[turn](*box[2:])
    return min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that does not say what is looked for.

    Raises:
        ValueError: that says how to write it.
    """
    if OBJECT not in prompt:
        raise ValueError(f"prompt={prompt!r} names no {OBJECT}; write it where the name goes.")
