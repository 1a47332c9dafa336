"""Questions on drawn scenes that nothing was tuned on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from ocvtp.choices import Level, Split
from ocvtp.data.questions import KINDS, ask
from ocvtp.evaluation.tasks.base import Item, Supplied
from ocvtp.evaluation.tasks.drawn import DrawnTask, edge_of
from ocvtp.evaluation.tasks.registry import register_task

_EVEN = dict.fromkeys(KINDS, 1 / len(KINDS))
_STREAM = 2  # of random numbers, beside those of drawing and training


@register_task("scenes")
class SceneTask(DrawnTask):
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
        super().__init__(levels, split, num_images, questions, seed, size)
        self.metrics = tuple(f"{level}/all" for level in levels)

    @classmethod
    def from_command(
        cls,
        supplied: Supplied,
        *,
        levels: Annotated[Sequence[Level], "of the scenes"] = ("easy", "hard"),
        split: Annotated[Split, "of the scenes"] = "test",
        num_images: Annotated[int, "scenes of each of --levels"] = 1000,
        questions: Annotated[int, "on an image"] = 8,
        seed: Annotated[int, "of scenes and questions"] = 0,
    ) -> SceneTask:
        return cls(levels, split, num_images, questions, seed, edge_of(supplied))

    def _ask(self, owner: int) -> list[Item]:
        level, index = self._place(owner)
        rng = self._random(owner, _STREAM)
        asked = ask(self._scene(owner).objects, self.questions, rng, _EVEN, distinct=True)
        return [
            Item(f"{level}/{index}/{n}", owner, q.text, (q.answer,), f"{level}/{q.kind}")
            for n, q in enumerate(asked)
        ]
