"""Conversations about images, in the format that LLaVA is trained on.

H x W are the pixels of an upright image.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.data.image_names import check_inside
from ocvtp.data.json_entries import Entry, read_entries
from ocvtp.data.module import QuestionSetDataModule
from ocvtp.data.question_sets import ImageQuestion, Places, QuestionSet

logger = logging.getLogger(__name__)

PLACEHOLDER = "<image>"
"""Of an image, in the first turn of a conversation."""
_ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Boxes(Places):
    """Boxes of objects on an upright image: left, top, right and bottom edge in pixels."""

    boxes: tuple[Box, ...]

    def masks(self, size: tuple[int, int], turn: Image.Transpose | None) -> NDArray[np.bool_]:
        """A box covers all pixels that it touches."""
        blank = Image.new("1", size)
        width, height = (blank if turn is None else blank.transpose(turn)).size
        masks = np.zeros((len(self.boxes), height, width), np.bool_)
        for mask, (left, top, right, bottom) in zip(masks, self.boxes, strict=True):
            rows = slice(max(math.floor(top), 0), max(math.ceil(bottom), 0))
            mask[rows, max(math.floor(left), 0) : max(math.ceil(right), 0)] = True
            if not mask.any():
                raise ValueError(
                    f"the box {[left, top, right, bottom]} lies outside of the image, which has"
                    f" {width} x {height} pixels; pass left, top, right and bottom in pixels"
                )
        return masks


class ConversationDataModule(QuestionSetDataModule):
    """Questions and answers about images from files of conversations.

    A file is a JSON list, or JSON lines, of samples
    `{"image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image> What?"},
    {"from": "gpt", "value": "That."}, ..], "boxes": [[left, top, right, bottom], ..]}`. Every
    answer makes a question of its own, with all that was said before it. `<image>` may stand once,
    in the first turn, and is taken out: the chat template of the model puts the image where it
    belongs. Boxes, in pixels of the upright image, are the objects that all questions of the sample
    are about, or, in a turn of the human, those that this one is about; without any, nobody says.

    Paths are relative to `root`.

    Args:
        root: folder of it all.
        train_file: the training conversations.
        val_file: those of the validation; None for none.
        images: folder that the names of images start from; they may not lead out of it without
            `outside`.
        limit_train: use only the first so many training samples.
        limit_val: the same for validation.
        on_error: `raise` on a sample that cannot be used (also one without an image) and on an
            unreadable image, or `skip` it: samples are counted in a warning, images named in
            `errors`.
        options: of `QuestionSetDataModule`.

    Raises:
        ValueError: if a limit is below 1.
    """

    def __init__(
        self,
        root: str,
        train_file: str,
        val_file: str | None = None,
        images: str = "",
        limit_train: int | None = None,
        limit_val: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, limit in (("limit_train", limit_train), ("limit_val", limit_val)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} leaves no sample; pass 1 or more, or None.")
        self.root = Path(root)
        self._files = {"train": (train_file, limit_train), "val": (val_file, limit_val)}
        self._images, self._on_error = images, on_error

    @property
    def has_validation(self) -> bool:
        return self._files["val"][0] is not None

    def questions(self, split: Literal["train", "val"]) -> QuestionSet:
        name, limit = self._files[split]
        path, folder = self.root / (name or ""), self.root / self._images
        faults: list[str] | None = [] if self._on_error == "skip" else None
        asked: list[ImageQuestion] = []
        for entry in read_entries(path, faults)[:limit]:
            try:
                asked += list(_asked(entry, split, folder, self.outside))
            except ValueError as error:
                if faults is None:
                    raise
                faults.append(str(error))
        if faults:
            logger.warning(
                "%s: left out %d of the samples; the first: %s", path, len(faults), faults[0]
            )
        return QuestionSet(folder, asked, self._on_error, self.outside)


def _asked(entry: Entry, split: str, folder: Path, outside: bool) -> Iterator[ImageQuestion]:
    """The questions of a sample."""
    image = entry.text("image")
    try:
        if not outside:
            check_inside(image, folder)
    except ValueError as error:
        raise ValueError(f"{entry.where} cannot be used: {error}") from error
    turns = entry.content.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ValueError(
            f"{entry.where} has no whole 'conversations'; pass a list of turns, a human's and gpt's"
            " in turn."
        )
    said: list[str] = []
    shared = _boxes(entry.content, entry.where)
    for number, turn in enumerate(turns):
        said.append(_text(turn, number, entry.where))
        if number % 2:
            question, answer = said[-2:]
            own = _boxes(turns[number - 1], f"turn {number} of {entry.where}")
            key = f"{split}/{entry.number}/{number // 2}"
            places = shared if own is None else own
            yield ImageQuestion(key, image, question, answer, places, tuple(said[:-2]))


def _text(turn: Any, number: int, where: str) -> str:
    """What is said in a turn."""
    where = f"turn {number + 1} of {where}"
    role = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(role, str) or _ROLES.get(role) != number % 2:
        wanted = "gpt" if number % 2 else "human"
        raise ValueError(f"{where} is from {role!r}, not from {wanted!r}; pass them in turn.")
    text = turn.get("value")
    if not isinstance(text, str):
        raise ValueError(f"{where} has {text!r} as 'value'; pass a text in quotes.")
    times = text.count(PLACEHOLDER)
    if times > (number == 0):
        raise ValueError(
            f"{where} has {times} {PLACEHOLDER}; pass one image a sample, and {PLACEHOLDER} once,"
            " in its first turn."
        )
    text = text.replace(PLACEHOLDER, "").strip()
    if not text:
        raise ValueError(f"{where} says nothing; pass a text.")
    return text


def _boxes(content: dict[str, Any], where: str) -> Boxes | None:
    """Those of a sample or of a turn; None where it has none."""
    given = content.get("boxes")
    if given is None:
        return None
    for box in given if isinstance(given, list) else [given]:
        if not _is_box(box):
            raise ValueError(
                f"{where} has the box {box!r}; pass [left, top, right, bottom] in pixels, each in"
                " a list of boxes."
            )
    return Boxes(tuple((b[0], b[1], b[2], b[3]) for b in given))


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    if not all(type(number) in (int, float) and math.isfinite(number) for number in box):
        return False
    return bool(box[0] < box[2] and box[1] < box[3])
