"""Questions about images, each with its answer and the places that it is about.

H x W are the pixels of an upright image, O the objects that a question is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from ocvtp.data.annotations import CocoFile, Entry
from ocvtp.data.image_names import check_inside, inside
from ocvtp.images import IMAGE_ERRORS, opened, to_rgb, turn_of

_CACHED = 8
"""Images that stay open: the questions of one are read one after the other."""


class Places(Protocol):
    """Where the objects of a question are."""

    def masks(self, size: tuple[int, int], turn: Image.Transpose | None) -> NDArray[np.bool_]:
        """[O, H, W] their pixels.

        Args:
            size: width and height of the image as it is stored.
            turn: what turns it upright.

        Raises:
            ValueError: if they do not fit the image.
        """
        ...


@dataclass(frozen=True, eq=False)
class Annotated(Places):
    """Objects of a COCO file.

    Args:
        file: where they are annotated.
        image_id: of their image.
        entries: their annotations, which have masks.
    """

    file: CocoFile
    image_id: int
    entries: tuple[Entry, ...]

    def masks(self, size: tuple[int, int], turn: Image.Transpose | None) -> NDArray[np.bool_]:
        return self.file.upright_masks(self.image_id, self.entries, size, turn)


@dataclass(frozen=True)
class ImageQuestion:
    """A question about an image.

    Args:
        key: names the question among all of its set, in every run.
        image: file of the image, relative to the folder of the set.
        question: what is asked.
        answer: what should be said.
        places: where the objects are that it is about; None if nobody says.
        before: what was said on the image before: a question, its answer, and so on.
    """

    key: str
    image: str
    question: str
    answer: str
    places: Places | None = None
    before: tuple[str, ...] = ()


class QuestionTransform(Protocol):
    """What turns items of a `QuestionSet` into a batch, see `ocvtp.training.prompts`."""

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch."""
        ...


class QuestionSet(Dataset[dict[str, Any]]):
    """Questions about images in a folder, those of one image side by side.

    An item is a dict of `image`, upright RGB, `question`, `answer`, `before`, `key` (see
    `ImageQuestion`) and `masks`, [O, H, W] bool of the objects that the question is about, O = 0
    where it is about something that is not there, or None where nobody says where they are. An
    image or a mask that cannot be read gives `{"error": "FILE: reason"}` where `on_error` is
    `skip`.

    Args:
        folder: of the images.
        questions: in any order; images keep that of their first question.
        on_error: `raise` a ValueError on an unreadable image, or `skip` it.
        outside: whether images may lie outside of the folder, see `ocvtp.data.image_names.inside`.

    Attributes:
        owners: [questions] number of the image of each, ascending.
        questions: in the order of the items.

    Raises:
        ValueError: if there is no such folder, no question, if two have one key, or if an image
            is not in the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        questions: Sequence[ImageQuestion],
        on_error: Literal["raise", "skip"] = "raise",
        outside: bool = False,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} is unknown; pass 'raise' or 'skip'.")
        self.folder, self.on_error = Path(folder), on_error
        self._outside = outside
        numbers = {name: n for n, name in enumerate(dict.fromkeys(q.image for q in questions))}
        self.questions = sorted(questions, key=lambda question: numbers[question.image])
        if not self.questions:
            raise ValueError(f"there is no question about images in {folder}; pass at least one.")
        if not self.folder.is_dir():
            raise ValueError(f"images folder {folder} does not exist; pass a folder of images.")
        for name in () if outside else numbers:
            check_inside(name, self.folder)
        seen: set[str] = set()
        for question in self.questions:
            if question.key in seen:
                raise ValueError(f"two questions are {question.key}; give each its own key.")
            seen.add(question.key)
        self.owners = np.array([numbers[q.image] for q in self.questions], np.int64)
        self._open = lru_cache(_CACHED)(self._read)

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def has_places(self) -> bool:
        """Whether somebody says of any question where what it is about is."""
        return any(question.places is not None for question in self.questions)

    def __getstate__(self) -> dict[str, Any]:  # every process opens its own images
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(_CACHED)(self._read)

    def __getitem__(self, index: int) -> dict[str, Any]:
        asked = self.questions[index]
        try:
            image, size, turn = self._open(asked.image)
            masks = None if asked.places is None else asked.places.masks(size, turn)
        except IMAGE_ERRORS as error:
            reason = str(error) or type(error).__name__
            if self.on_error == "skip":
                return {"error": f"{asked.image}: {reason}"}
            raise ValueError(
                f"question {asked.key} about {self.folder / asked.image} cannot be used: {reason};"
                " repair it, or pass on_error='skip' to continue without it."
            ) from error
        return {
            "image": image,
            "question": asked.question,
            "answer": asked.answer,
            "before": asked.before,
            "masks": masks,
            "key": asked.key,
        }

    def _read(self, name: str) -> tuple[Image.Image, tuple[int, int], Image.Transpose | None]:
        """The upright image, its size as it is stored, and what turned it."""
        with opened(inside(self.folder, name, self._outside)) as image:
            image.load()  # a PNG's orientation may come after its pixels
            turn, size, rgb = turn_of(image), image.size, to_rgb(image)
        rgb.info = {}
        return (rgb if turn is None else rgb.transpose(turn)), size, turn
