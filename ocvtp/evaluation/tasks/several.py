"""Questions about one of several drawn scenes in one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from ocvtp.choices import Level, Split
from ocvtp.data.several_images import ask_of_several
from ocvtp.evaluation.tasks.base import Item, Supplied
from ocvtp.evaluation.tasks.drawn import DrawnTask, edge_of
from ocvtp.evaluation.tasks.registry import register_task

_STREAM = 7  # of random numbers, beside those of other tasks


@register_task("several")
class SeveralTask(DrawnTask):
    """Is there a red circle in the second image? Half of the answers is yes.

    An answer is right if it is the word. Figures: `easy/all` of a level, and by what is asked for:
    `easy/there`, what the image has; `easy/elsewhere`, what another image of the prompt has, and
    `easy/nowhere`. Of the budget, every image keeps its own.

    Args:
        levels: of the scenes.
        split: `test`, or `val` where something is tuned by the figures.
        num_images: prompts of each level.
        images: in each prompt, 2 to 4.
        questions: on each prompt, at most.
        seed: of the scenes and questions.
        size: pixels of an edge.

    Raises:
        ValueError: if a level or split is unknown, or a number is out of range.
    """

    max_new_tokens: ClassVar[int] = 4

    def __init__(
        self,
        levels: Sequence[Level] = ("easy", "hard"),
        split: Split = "test",
        num_images: int = 500,
        images: int = 2,
        questions: int = 4,
        seed: int = 0,
        size: int = 96,
    ) -> None:
        super().__init__(levels, split, num_images, questions, seed, size, together=images)
        self.metrics = tuple(f"{level}/all" for level in levels)

    @classmethod
    def from_command(
        cls,
        supplied: Supplied,
        *,
        levels: Annotated[Sequence[Level], "of the scenes"] = ("easy", "hard"),
        split: Annotated[Split, "of the scenes"] = "test",
        num_images: Annotated[int, "prompts of each of --levels"] = 500,
        num_together: Annotated[int, "images in a prompt, 2 to 4"] = 2,
        questions: Annotated[int, "on the images of a prompt"] = 4,
        seed: Annotated[int, "of scenes and questions"] = 0,
    ) -> SeveralTask:
        edge = edge_of(supplied)
        return cls(levels, split, num_images, num_together, questions, seed, edge)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "together": self._together}

    def _ask(self, owner: int) -> list[Item]:
        level, index = self._place(owner)
        objects = [self._scene(number).objects for number in self.shown(owner)]
        asked = ask_of_several(objects, self.questions, self._random(owner, _STREAM))
        return [
            Item(f"{level}/{index}/{n}", owner, q.text, (q.answer,), f"{level}/{q.where}")
            for n, q in enumerate(asked)
        ]
