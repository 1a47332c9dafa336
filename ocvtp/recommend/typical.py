"""What a task asks of a model, in sizes: picture, words and tokens of a typical question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import TypeVar

from ocvtp.bench.workload import Cell
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.base import Task
from ocvtp.hosts.prompt.chat_template import find_tokenizer, with_template

_IMAGES, _QUESTIONS = 32, 200  # that are looked at, spread over the task
_T = TypeVar("_T")


@dataclass(frozen=True)
class Typical:
    """Medians over a task's own images and questions.

    Args:
        image_size: width and height in pixels, of the picture of median area.
        num_tokens: that the model makes of it, the ends of rows included.
        text_length: tokens of a prompt beside these.
    """

    image_size: tuple[int, int]
    num_tokens: int
    text_length: int

    def cell(self, batch_size: int) -> Cell:
        """The request that stands for the task where times are measured."""
        return Cell(batch_size, self.text_length, 1)

    def counts(self, num_keep: Sequence[int], shares: Sequence[float]) -> list[int]:
        """Budgets as tokens of an image, each once, large to small."""
        of_shares = [max(1, round(share * self.num_tokens)) for share in shares]
        return sorted({*num_keep, *of_shares}, reverse=True)


def typical(subject: Subject, task: Task) -> Typical:
    """The sizes of a task for a model."""
    owners = _spread(sorted({item.owner for item in task.items}), _IMAGES)
    sizes = sorted((task.image(owner).size for owner in owners), key=lambda s: (s[0] * s[1], s))
    size = sizes[(len(sizes) - 1) // 2]
    tokenizer = find_tokenizer(subject.processor)
    lengths = [
        len(tokenizer(with_template(subject.processor, item.question, 1)).input_ids) - 1
        for item in _spread(task.items, _QUESTIONS)
    ]
    return Typical(size, subject.sizer.tokens(size), median_low(lengths))


def _spread(values: Sequence[_T], most: int) -> list[_T]:
    """At most so many of them, at equal distances."""
    count = min(most, len(values))
    return [values[number * len(values) // count] for number in range(count)]
