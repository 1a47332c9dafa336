"""Tasks on drawn scenes: which there are, and where their objects lie."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.choices import Level, Split
from ocvtp.data.scenes import Scene, draw_scene, scene_style, split_seed
from ocvtp.evaluation.tasks.base import Item, Ratio, Record, Supplied, Task, shares

_CACHED = 256


class DrawnTask(Task):
    """Questions about scenes that are drawn when they are asked about; a word answers.

    Args:
        levels: of the scenes.
        split: `test`, or `val` where something is tuned by the figures.
        num_images: scenes of each level; where several are shown together, so many prompts.
        questions: on each, at most.
        seed: of the scenes and questions.
        size: pixels of an edge.
        together: scenes that are shown in one prompt.

    Raises:
        ValueError: if a level or split is unknown, or a number is out of range.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        split: Split,
        num_images: int,
        questions: int,
        seed: int,
        size: int,
        together: int = 1,
    ) -> None:
        if num_images < 1 or questions < 1 or not levels:
            raise ValueError(f"{levels=}, {num_images=}, {questions=}: pass at least one of each.")
        self.levels, self.split, self.seed, self.size = tuple(levels), split, seed, size
        self.num_images, self.questions = num_images, questions
        self._together = together
        self._styles = {level: scene_style(level) for level in levels}
        self._stream = split_seed(split, seed)
        self._scene = lru_cache(_CACHED)(self._draw)
        self.items = [
            item for owner in range(num_images * len(levels)) for item in self._ask(owner)
        ]

    @abstractmethod
    def _ask(self, owner: int) -> list[Item]:
        """What is asked about the scenes of an owner."""

    def ratios(self, records: Sequence[Record]) -> dict[str, Ratio]:
        pairs = zip(self.items, records, strict=True)
        return shares(self.items, [record["answer"].strip() in i.answers for i, record in pairs])

    def shown(self, owner: int) -> tuple[int, ...]:
        return tuple(range(owner * self._together, (owner + 1) * self._together))

    def image(self, owner: int) -> Image.Image:
        return Image.fromarray(self._scene(owner).image)

    def masks(self, owner: int) -> NDArray[np.bool_]:
        return np.stack([item.mask for item in self._scene(owner).objects])

    def describe(self) -> dict[str, Any]:
        names = ("levels", "split", "num_images", "questions", "seed", "size")
        return {name: getattr(self, name) for name in names} | {"levels": list(self.levels)}

    def _place(self, owner: int) -> tuple[Level, int]:
        return self.levels[owner // self.num_images], owner % self.num_images

    def _random(self, owner: int, stream: int) -> np.random.Generator:
        """Of an owner's questions; each kind of task has a stream of its own."""
        return np.random.default_rng([self._stream, self._place(owner)[1], stream])

    def _draw(self, number: int) -> Scene:
        owner, place = divmod(number, self._together)
        level, index = self._place(owner)
        scene = index * self._together + place
        return draw_scene(self._stream, scene, self.size, style=self._styles[level])


def edge_of(supplied: Supplied) -> int:
    """The size of scenes that a model sees whole; 96 where it has none of its own."""
    processor = supplied.processor("the VLM whose image size to draw")
    size = getattr(processor.image_processor, "crop_size", None)
    return size["height"] if size else 96
