"""What a task asks of a model, in sizes: picture, words and tokens of a typical question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import TypeVar

from ocvtp.bench.workload import Cell
from ocvtp.evaluation.prompts import prompt_text
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.base import Task
from ocvtp.hosts.prompt.chat_template import find_tokenizer

_IMAGES, _QUESTIONS = 32, 200  # that are looked at, spread over the task
_T = TypeVar("_T")


@dataclass(frozen=True)
class Typical:
    """Medians over a task's own images and questions.

    Args:
        image_size: width and height in pixels, of the picture of median area.
        num_tokens: that the model makes of it, the ends of rows included.
        text_length: tokens of a prompt beside those of its images.
        images: of a prompt.
    """

    image_size: tuple[int, int]
    num_tokens: int
    text_length: int
    images: int = 1

    def cell(self, batch_size: int) -> Cell:
        """The request that stands for the task where times are measured."""
        return Cell(batch_size, self.text_length, self.images)

    def counts(self, num_keep: Sequence[int], shares: Sequence[float]) -> list[int]:
        """Budgets as tokens of an image, each once, large to small."""
        of_shares = [max(1, round(share * self.num_tokens)) for share in shares]
        return sorted({*num_keep, *of_shares}, reverse=True)


def typical(subject: Subject, task: Task) -> Typical:
    """The sizes of a task for a model."""
    owners = _spread(sorted({item.owner for item in task.items}), _IMAGES)
    firsts = [task.shown(owner)[0] for owner in owners]
    sizes = sorted((task.image(number).size for number in firsts), key=lambda s: (s[0] * s[1], s))
    size = sizes[(len(sizes) - 1) // 2]
    tokenizer = find_tokenizer(subject.processor)
    images = len(task.shown(task.items[0].owner))
    talks = [(*item.before, item.question) for item in _spread(task.items, _QUESTIONS)]
    lengths = [
        len(tokenizer(prompt_text(subject.processor, talk, images)).input_ids) - images
        for talk in talks
    ]
    return Typical(size, subject.sizer.tokens(size), median_low(lengths), images)


def _spread(values: Sequence[_T], most: int) -> list[_T]:
    """At most so many of them, at equal distances."""
    count = min(most, len(values))
    return [values[number * len(values) // count] for number in range(count)]
