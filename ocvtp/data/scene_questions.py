"""Questions about scenes that `write_scenes` drew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ocvtp.choices import Split
from ocvtp.data.annotations import CocoFile, Entry
from ocvtp.data.question_sets import Annotated, ImageQuestion
from ocvtp.data.questions import Question, ask
from ocvtp.data.scenes import split_seed

_STREAM = 3  # of random numbers, beside those of drawing, of the task and of its model's training
_ROUNDS = 8


@dataclass(frozen=True)
class _Object:
    """See `ocvtp.data.questions.Thing`."""

    shape: str
    colour: str
    size: str


def scene_questions(
    root: str | Path, folder: str, split: Split, num: int, seed: int
) -> Iterator[ImageQuestion]:
    """So many questions on every scene of a split.

    None is asked twice on a scene as long as there are others.

    Args:
        root: of the set. folder: of the scenes in it, as `write_scenes` made it.
        split: of the scenes.
        num: questions on each.
        seed: of the scenes, which the questions go with.

    Raises:
        ValueError: if the annotation file is not what `write_scenes` writes.
    """
    file = CocoFile(Path(root) / folder / f"annotations/instances_{split}2017.json", True)
    stream = split_seed(split, seed)
    for image_id, image in file.images.items():
        entries = file.objects(image_id)
        random = np.random.default_rng([stream, image_id, _STREAM])
        asked = _asked([_object(entry, file) for entry in entries], num, random)
        for number in range(num):
            one = asked[number % len(asked)]
            about = tuple(entries[place] for place in one.objects)
            yield ImageQuestion(
                key="/".join(filter(None, (folder, split, str(image_id), str(number)))),
                image=str(Path(folder) / f"{split}2017" / image["file_name"]),
                question=one.text,
                answer=one.answer,
                places=Annotated(file, image_id, about),
            )


def _asked(things: Sequence[_Object], num: int, random: np.random.Generator) -> list[Question]:
    """At least one question, and so many different ones if there are."""
    asked: list[Question] = []
    for _ in range(_ROUNDS):
        more = ask(things, num, random, distinct=True)
        asked += [question for question in more if question not in asked]
        if len(asked) >= num:
            break
    return asked[:num]


def _object(entry: Entry, file: CocoFile) -> _Object:
    try:
        return _Object(file.categories[entry["category_id"]], entry["colour"], entry["size"])
    except KeyError as error:
        raise ValueError(
            f"annotation file {file.path} has an object without {error}; pass scenes that"
            " write_scenes drew."
        ) from error
