"""Boxes that models say: finding the numbers in a text, and how well two boxes fit.

Pure functions. A box is x1, y1, x2, y2: its left, upper, right and lower edge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ocvtp.data.grounding import Box

LEAST_OVERLAP = 0.5
"""Intersection over union from which on a box counts as found, as for referring expressions."""
_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
_NUMBERS = re.compile(rf"(?<![\w.]){_NUMBER}(?![\w%])")
_BETWEEN = r"[\s,;]+"
_FOUR = _BETWEEN.join(rf"({_NUMBER})" for _ in range(4))
_TWO_PAIRS = re.compile(
    r"\(\s*{n}{b}{n}\s*\)[\s,;]*\(\s*{n}{b}{n}\s*\)".format(n=f"({_NUMBER})", b=_BETWEEN)
)
_BRACKETS = re.compile(rf"[\[(<]\s*{_FOUR}\s*[\])>]")
_NAMED = re.compile(
    rf"[\"']?(?:bbox_2d|bbox|bounding_box|box)[\"']?\s*[:=]\s*[\[(]+\s*{_FOUR}", re.IGNORECASE
)


def parse_box(text: str) -> Box | None:
    """The first box of an answer, in the numbers that it has; None where there is none.

    In this order: a list named `bbox_2d`, `bbox` or `box` (Qwen2.5-VL's and Qwen3-VL's JSON), four
    numbers in brackets (LLaVA's `[0.1, 0.2, 0.3, 0.4]`, InternVL's `<box>[[1, 2, 3, 4]]</box>`),
    two pairs (Qwen2-VL's `(1,2),(3,4)`), and a text that has four numbers and no other.
    """
    for form in (_NAMED, _BRACKETS, _TWO_PAIRS):
        if found := form.search(text):
            return _box(found.groups())
    numbers = _NUMBERS.findall(text)
    return _box(numbers) if len(numbers) == 4 else None


def overlap(a: Box, b: Box) -> float:
    """Intersection over union; 0 for a box without an area, e.g. with its edges exchanged."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    areas = [_area(box) for box in (a, b)]
    if min(width, height, *areas) <= 0:
        return 0.0
    shared = width * height
    return shared / (sum(areas) - shared)


def _area(box: Box) -> float:
    width, height = box[2] - box[0], box[3] - box[1]
    return width * height if width > 0 and height > 0 else 0.0


def _box(numbers: Sequence[str]) -> Box | None:
    x1, y1, x2, y2 = (float(number) for number in numbers)
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None
