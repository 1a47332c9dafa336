"""Questions about COCO's images: what there is in them, and captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ocvtp.data.annotations import CaptionFile, CocoFile, Entry
from ocvtp.data.existence import (
    NEGATIVES,
    Negatives,
    absent_thing,
    counts_together,
    existence_question,
)
from ocvtp.data.masks import has_mask
from ocvtp.data.module import QuestionSetDataModule
from ocvtp.data.question_sets import Annotated, ImageQuestion, QuestionSet

DESCRIBE = "Describe the image."
_EXISTENCE, _CAPTIONS = 0, 1  # streams of random numbers


class CocoQuestionDataModule(QuestionSetDataModule):
    """Questions about COCO's images, from its annotation files.

    Existence is asked as POPE asks it: is there a dog in the image? Half of the answers is no. An
    image has as many pairs of a yes and a no as it has objects and absent categories for, at most
    half of `existence`. Masks of a yes are all objects of the category, crowds too, and boxes where
    there is no mask; a no has none. Captions answer "Describe the image."; nobody says where what
    they are about is.

    Paths are relative to `root`. Questions are the same in every run.

    Args:
        root: folder of it all.
        train_images: folder of the training images.
        train_annotations: their `instances` file; None asks for captions alone.
        train_captions: their `captions` file; None for none.
        val_images: folder of the validation images; None for no validation.
        val_annotations: see `train_annotations`. val_captions: see `train_captions`.
        existence: questions of existence on an image, an even number.
        captions: of an image, at most, where there is a file of them.
        negatives: kinds of what is asked for in vain, in turn, see `ocvtp.data.existence`.
        suffix: put after every question of existence, e.g. LLaVA's own "Answer the question using a
            single word or phrase." after a new line.
        question_seed: of the questions, not negative.
        limit_train: use only the first so many training images, by their ids.
        limit_val: the same for validation.
        on_error: `raise` on an unreadable image or mask, or `skip` the question and name it in
            `errors`.
        options: of `QuestionSetDataModule`.

    Raises:
        ValueError: if a number is out of range, or there is no kind of negatives.
    """

    def __init__(
        self,
        root: str,
        train_images: str = "train2017",
        train_annotations: str | None = "annotations/instances_train2017.json",
        train_captions: str | None = None,
        val_images: str | None = "val2017",
        val_annotations: str | None = "annotations/instances_val2017.json",
        val_captions: str | None = None,
        existence: int = 6,
        captions: int = 1,
        negatives: Sequence[Negatives] = ("adversarial", "popular", "random"),
        suffix: str = "",
        question_seed: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if existence < 0 or existence % 2 or captions < 0 or question_seed < 0:
            raise ValueError(
                f"{existence=}, {captions=}, {question_seed=}: pass no negative numbers, and an"
                " even number of questions of existence, as half of the answers is no."
            )
        if not negatives or not set(negatives) <= set(NEGATIVES):
            raise ValueError(f"negatives={list(negatives)}; pass some of {list(NEGATIVES)}.")
        for name, limit in (("limit_train", limit_train), ("limit_val", limit_val)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} leaves no image; pass 1 or more, or None.")
        self.root = Path(root)
        self._files = {
            "train": (train_images, train_annotations, train_captions, limit_train),
            "val": (val_images, val_annotations, val_captions, limit_val),
        }
        self._existence, self._captions = existence, captions
        self._negatives, self._suffix = tuple(negatives), suffix
        self._seed, self._on_error = question_seed, on_error

    @property
    def has_validation(self) -> bool:
        return self._files["val"][0] is not None

    def questions(self, split: Literal["train", "val"]) -> QuestionSet:
        images, annotations, captions, limit = self._files[split]
        asked: list[ImageQuestion] = []
        if annotations is not None:
            asked += self._of_existence(self.root / annotations, split, limit)
        if captions is not None:
            asked += self._of_captions(self.root / captions, split, limit)
        return QuestionSet(self.root / (images or ""), asked, self._on_error, self.outside)

    def _of_existence(self, path: Path, split: str, limit: int | None) -> Iterator[ImageQuestion]:
        file = CocoFile(path, with_categories=True)
        names, places = list(file.categories.values()), _places(file)
        together = counts_together(names, [[*own] for own in places.values()])
        for image_id in sorted(file.images)[:limit]:
            own = places[image_id]
            random = np.random.default_rng([self._seed, image_id, _EXISTENCE])
            pairs = self._pairs(names, list(own), together, random)
            for number, (thing, answer) in enumerate(pairs):
                about = own.get(thing, ())
                yield ImageQuestion(
                    key=f"{split}/{image_id}/{number}",
                    image=file.images[image_id]["file_name"],
                    question=existence_question(thing) + self._suffix,
                    answer=answer,
                    places=None if about is None else Annotated(file, image_id, about),
                )

    def _pairs(
        self,
        names: Sequence[str],
        present: Sequence[str],
        together: NDArray[np.int64],
        random: np.random.Generator,
    ) -> Iterator[tuple[str, str]]:
        """Things to ask for, with the answers: yes and no in turn."""
        free = np.array([name not in present for name in names])
        num = min(self._existence // 2, len(present), int(free.sum()))
        first = int(random.integers(len(self._negatives)))
        for number, place in enumerate(random.permutation(len(present))[:num].tolist()):
            kind = self._negatives[(first + number) % len(self._negatives)]
            thing = names.index(present[place])
            absent = absent_thing(kind, thing, together, free, random)
            free[absent] = False
            yield names[thing], "yes"
            yield names[absent], "no"

    def _of_captions(self, path: Path, split: str, limit: int | None) -> Iterator[ImageQuestion]:
        file = CaptionFile(path)
        for image_id in sorted(file.images)[:limit]:
            texts = file.captions.get(image_id, [])
            random = np.random.default_rng([self._seed, image_id, _CAPTIONS])
            for number in random.permutation(len(texts))[: self._captions].tolist():
                key, image = f"{split}/{image_id}/caption {number}", file.images[image_id]
                yield ImageQuestion(key, image["file_name"], DESCRIBE, texts[number])


def _places(file: CocoFile) -> dict[int, Mapping[str, tuple[Entry, ...] | None]]:
    """Of every image the names of what it has, with all of that; None where it has no place."""
    found: dict[int, Mapping[str, tuple[Entry, ...] | None]] = {}
    for image_id in file.images:
        own: dict[str, list[Entry | None]] = {}
        for entry in file.objects(image_id):
            own.setdefault(file.categories[entry["category_id"]], []).append(_masked(entry))
        found[image_id] = {
            name: None if None in entries else tuple(entry for entry in entries if entry)
            for name, entries in own.items()
        }
    return found


def _masked(entry: Entry) -> Entry | None:
    """The annotation, its box as its mask where it has none; None where it has no box either."""
    if has_mask(entry.get("segmentation")):
        return entry
    box = entry.get("bbox")
    if not box:
        return None
    try:
        x, y, width, height = (float(number) for number in box)
    except (TypeError, ValueError) as error:
        number = entry.get("id", f"of image {entry['image_id']}")
        raise ValueError(
            f"annotation {number} has the bbox {box!r}; pass x, y, width and height in pixels."
        ) from error
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {**entry, "segmentation": [corners]}
