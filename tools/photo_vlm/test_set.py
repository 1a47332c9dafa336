"""The composites that figures are measured on, as files in COCO's layout, with their questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ocvtp.data.masks import write_mask
from ocvtp.reporting.files import replacing
from tools.photo_vlm.composites import Composite, Painter
from tools.photo_vlm.questions import KINDS, Asker
from tools.photo_vlm.task import IMAGES, INSTANCES, QUESTIONS

_EVEN = dict.fromkeys(KINDS, 1 / len(KINDS))
_STREAM = 2  # of random numbers, beside those of drawing and training


def write_test_set(root: Path, painter: Painter, asker: Asker, num: int, questions: int) -> None:
    """Draw the first `num` composites as PNGs, with masks and English questions.

    The same arguments write the same files; what is there is written over, the questions last.

    Args:
        root: made where absent.
        painter: of the split `test`.
        asker: of the questions.
        num: composites.
        questions: on each, of each kind alike, none twice.
    """
    categories = painter.cutouts.categories
    listed = [{"id": n, "name": name} for n, name in enumerate(categories, start=1)]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": listed}
    asked = []
    for index in range(num):
        composite, name = painter.draw(index), f"{index + 1:012d}.png"
        with replacing(root / IMAGES / name) as temporary:
            Image.fromarray(composite.image).save(temporary, format="PNG")
        size = len(composite.image)
        content["images"] += [{"id": index + 1, "file_name": name, "width": size, "height": size}]
        first = len(content["annotations"]) + 1
        content["annotations"] += _annotations(composite, categories, index + 1, first)
        rng = np.random.default_rng([painter.seed, index, _STREAM])
        for question in asker.ask(composite.objects, questions, rng, _EVEN, distinct=True):
            asked.append({"image": name, **asdict(question)})
    with replacing(root / INSTANCES) as temporary:
        temporary.write_text(json.dumps(content))
    with replacing(root / QUESTIONS) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in asked))


def _annotations(
    composite: Composite, categories: tuple[str, ...], image_id: int, first_id: int
) -> Iterator[dict[str, Any]]:
    """COCO's record of every object."""
    for number, item in enumerate(composite.objects, start=first_id):
        yield {
            "id": number,
            "image_id": image_id,
            "category_id": categories.index(item.category) + 1,
            "segmentation": write_mask(item.mask),
            "area": item.area,
            "iscrowd": 0,
        }
