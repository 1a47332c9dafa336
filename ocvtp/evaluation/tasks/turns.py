"""Conversations about drawn scenes: do the tokens that the first question chose serve the next?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from ocvtp.choices import Level, Split
from ocvtp.data.questions import KINDS, ask
from ocvtp.evaluation.tasks.base import Item, Supplied
from ocvtp.evaluation.tasks.drawn import DrawnTask, edge_of
from ocvtp.evaluation.tasks.registry import register_task

_EVEN = dict.fromkeys(KINDS, 1 / len(KINDS))
_STREAM = 6  # of random numbers, beside those of other tasks


@register_task("turns")
class TurnsTask(DrawnTask):
    """Several questions about a drawn scene, one after the other; figures by turn.

    Every question comes after those before it and their right answers, so that turns are compared
    without the mistakes of earlier ones. An answer is right if it is the word. Figures:
    `easy/turn1` for a level and a turn, `easy/all` for all turns.

    Args:
        levels: of the scenes.
        split: `test`, or `val` where something is tuned by the figures.
        num_images: scenes of each level.
        questions: on each, at most.
        cache: whether the KV cache of the first question stays, and with it the tokens that were
            kept for that; else the whole conversation is read again for every question, and a
            pruner that reads the prompt reads all that the user said.
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
        questions: int = 3,
        cache: bool = True,
        seed: int = 0,
        size: int = 96,
    ) -> None:
        if questions < 2:
            raise ValueError(f"questions={questions} is no conversation; pass at least 2.")
        self.keeps_cache = cache
        super().__init__(levels, split, num_images, questions, seed, size)
        turns = [f"turn{number}" for number in range(1, questions + 1)]
        self.metrics = tuple(f"{level}/{name}" for level in levels for name in ("all", *turns))

    @classmethod
    def from_command(
        cls,
        supplied: Supplied,
        *,
        levels: Annotated[Sequence[Level], "of the scenes"] = ("easy", "hard"),
        split: Annotated[Split, "of the scenes"] = "test",
        num_images: Annotated[int, "scenes of each of --levels"] = 500,
        questions: Annotated[int, "on an image, one after the other"] = 3,
        cache: Annotated[
            bool, "later questions go on from the KV cache of the first; else all is read again"
        ] = True,
        seed: Annotated[int, "of scenes and questions"] = 0,
    ) -> TurnsTask:
        return cls(levels, split, num_images, questions, cache, seed, edge_of(supplied))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "cache": self.keeps_cache}

    def _ask(self, owner: int) -> list[Item]:
        level, index = self._place(owner)
        objects, rng = self._scene(owner).objects, self._random(owner, _STREAM)
        asked = ask(objects, self.questions, rng, _EVEN, distinct=True)
        said = [text for question in asked for text in (question.text, question.answer)]
        return [
            Item(
                f"{level}/{index}/{n}",
                owner,
                question.text,
                (question.answer,),
                f"{level}/turn{n + 1}",
                tuple(said[: 2 * n]),
            )
            for n, question in enumerate(asked)
        ]
