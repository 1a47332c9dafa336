"""Questions on drawn scenes that nothing was tuned on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.choices import Level, Split
from ocvtp.data.questions import KINDS, ask
from ocvtp.data.scenes import Scene, draw_scene, scene_style, split_seed
from ocvtp.evaluation.tasks.base import Item, Ratio, Record, Supplied, Task, shares
from ocvtp.evaluation.tasks.registry import register_task

_EVEN = dict.fromkeys(KINDS, 1 / len(KINDS))
_STREAM = 2  # of random numbers, beside those of drawing and training
_CACHED = 256


@register_task("scenes")
class SceneTask(Task):
    """Existence, colour, shape and number of drawn objects; an answer is right if it is the word.

    Questions are of each kind alike, and none is asked twice on an image. Figures: `easy/colour`
    for a level and a kind, `easy/all` for all kinds.

    Args:
        levels: of the scenes.
        split: `test`, or `val` where something is tuned by the figures.
        num_images: scenes of each level.
        questions: on each, at most.
        seed: of the scenes and questions.
        size: pixels of an edge.

    Raises:
        ValueError: if a level or split is unknown, or a number is out of range.
    """

    max_new_tokens: ClassVar[int] = 4
    lmms: ClassVar[str] = "scenes"

    def __init__(
        self,
        levels: Sequence[Level] = ("easy", "hard"),
        split: Split = "test",
        num_images: int = 1000,
        questions: int = 8,
        seed: int = 0,
        size: int = 96,
    ) -> None:
        if num_images < 1 or questions < 1 or not levels:
            raise ValueError(f"{levels=}, {num_images=}, {questions=}: pass at least one of each.")
        self.levels, self.split, self.seed, self.size = tuple(levels), split, seed, size
        self.num_images, self.questions = num_images, questions
        self._styles = {level: scene_style(level) for level in levels}
        self._stream = split_seed(split, seed)
        self._scene = lru_cache(_CACHED)(self._draw)
        self.items = [
            item for owner in range(num_images * len(levels)) for item in self._ask(owner)
        ]
        self.metrics = tuple(f"{level}/all" for level in levels)

    @classmethod
    def from_command(
        cls,
        supplied: Supplied,
        *,
        levels: Annotated[Sequence[Level], "of the scenes"] = ("easy", "hard"),
        split: Annotated[Split, "of the scenes"] = "test",
        num_images: Annotated[int, "of each level"] = 1000,
        questions: Annotated[int, "on an image"] = 8,
        seed: Annotated[int, "of scenes and questions"] = 0,
    ) -> SceneTask:
        processor = supplied.processor("the VLM whose image size to draw")
        size = getattr(processor.image_processor, "crop_size", None)
        edge = size["height"] if size else 96
        return cls(levels, split, num_images, questions, seed, edge)

    def image(self, owner: int) -> Image.Image:
        return Image.fromarray(self._scene(owner).image)

    def masks(self, owner: int) -> NDArray[np.bool_]:
        return np.stack([item.mask for item in self._scene(owner).objects])

    def ratios(self, records: Sequence[Record]) -> dict[str, Ratio]:
        right = [
            record["answer"].strip() in item.answers
            for item, record in zip(self.items, records, strict=True)
        ]
        return shares(self.items, right)

    def describe(self) -> dict[str, Any]:
        names = ("levels", "split", "num_images", "questions", "seed", "size")
        return {name: getattr(self, name) for name in names} | {"levels": list(self.levels)}

    def _draw(self, owner: int) -> Scene:
        level, index = self._place(owner)
        return draw_scene(self._stream, index, self.size, style=self._styles[level])

    def _place(self, owner: int) -> tuple[Level, int]:
        return self.levels[owner // self.num_images], owner % self.num_images

    def _ask(self, owner: int) -> list[Item]:
        level, index = self._place(owner)
        rng = np.random.default_rng([self._stream, index, _STREAM])
        asked = ask(self._scene(owner).objects, self.questions, rng, _EVEN, distinct=True)
        return [
            Item(f"{level}/{index}/{n}", owner, q.text, (q.answer,), f"{level}/{q.kind}")
            for n, q in enumerate(asked)
        ]
