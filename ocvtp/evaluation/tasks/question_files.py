"""Tasks that are read from files: a list of questions, and folders of images."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ocvtp.data.image_names import inside
from ocvtp.data.json_entries import Entry as Entry
from ocvtp.data.json_entries import read_entries as read_entries
from ocvtp.evaluation.tasks.base import Item, Record, Task
from ocvtp.images import open_image

Folders = str | Path | Sequence[str | Path]
_OLD_NAME = re.compile(r"COCO_(?:train|val|test)\d{4}_(?=\d{12}\.)")


@dataclass(frozen=True)
class Asked:
    """A question as a file has it: `Item`, with the name of the image in place of its number."""

    key: str
    image: str
    question: str
    answers: tuple[str, ...]
    kind: str = ""


class ListedTask(Task):
    """Questions about images in folders.

    The images are numbered as they appear; the questions of one image stand side by side.

    Args:
        asked: the questions.
        images: folder or folders of the images. A name is looked up as it stands, then as COCO's
            of 2017: `COCO_val2014_000000310196.jpg` is `000000310196.jpg`.
        suffix: put after every question.
        limit: use only the first `limit` images.
        outside: whether images may lie outside of the folders, see `locate_images`.

    Raises:
        ValueError: if there is no question, if two have one key, if an image is missing or lies
            outside, or if `limit` is below 1.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        images: Folders,
        suffix: str = "",
        limit: int | None = None,
        outside: bool = False,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} leaves no image; pass at least 1, or None for all.")
        if not asked:
            raise ValueError(f"a {self.name} task needs questions; the files hold none.")
        names = {name_of_2017(entry.image): entry.image for entry in reversed(asked)}
        order = list(dict.fromkeys(name_of_2017(entry.image) for entry in asked))[:limit]
        owners = {name: number for number, name in enumerate(order)}
        items = [
            Item(e.key, owners[name], e.question + suffix, e.answers, e.kind)
            for e in asked
            if (name := name_of_2017(e.image)) in owners
        ]
        _check_keys(items)
        self.items = sorted(items, key=lambda item: item.owner)
        self.image_names = order
        self.suffix = suffix
        self._paths = locate_images([names[name] for name in order], images, outside)

    def image(self, owner: int) -> Image.Image:
        """The RGB image of that number, upright, see `open_image`.

        Raises:
            ValueError: if the file is no image.
        """
        return open_image(self._paths[owner])

    def describe(self) -> dict[str, Any]:
        asked = [[i.key, i.owner, i.question, i.answers, i.kind] for i in self.items]
        files = [[path.name, path.stat().st_size] for path in self._paths]
        return {
            "num_images": len(files),
            "num_questions": len(asked),
            "suffix": self.suffix,
            "questions": fingerprint(asked),
            "images": fingerprint(files),
        }

    def answers(self, records: Sequence[Record]) -> list[str]:
        """What was said to every item.

        Raises:
            ValueError: if there are more or fewer records than items.
        """
        if len(records) != len(self.items):
            raise ValueError(
                f"{len(records)} records for {len(self.items)} items; pass one of each, in order."
            )
        return [str(record["answer"]) for record in records]


def fingerprint(content: Any) -> str:
    """Sixteen hexadecimal digits that stand for JSON content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def name_of_2017(name: str) -> str:
    """COCO's later name of an image: without `COCO_val2014_` before the number."""
    return _OLD_NAME.sub("", name)


def locate_images(names: Sequence[str], folders: Folders, outside: bool = False) -> list[Path]:
    """The files of images, each looked up by `name` and by `name_of_2017(name)`.

    Args:
        names: of the images, from any of the folders.
        folders: of the images.
        outside: whether they may lie outside, see `ocvtp.data.image_names.inside`.

    Raises:
        ValueError: if a folder does not exist, or any image lies in none of them, or outside.
    """
    places = [Path(f) for f in ([folders] if isinstance(folders, str | Path) else folders)]
    absent = [str(place) for place in places if not place.is_dir()]
    if absent or not places:
        raise ValueError(
            f"images folder {', '.join(absent) or '(none)'} does not exist; pass one that does."
        )
    found = {
        name: path
        for name in names
        if (path := _first_file(places, (name, name_of_2017(name)), outside))
    }
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} images are not in {', '.join(map(str, places))}, "
            f"e.g. {', '.join(missing[:3])}; pass every folder that holds some of them, under "
            "these names or COCO's of 2017 (val2014 is spread over train2017 and val2017)."
        )
    return [found[name] for name in names]


def _first_file(places: Sequence[Path], names: Iterable[str], outside: bool) -> Path | None:
    paths = (inside(place, name, outside) for place in places for name in names)
    return next((path for path in paths if path.is_file()), None)


def _check_keys(items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.key in seen:
            raise ValueError(f"two questions are {item.key}; give every question its own number.")
        seen.add(item.key)
