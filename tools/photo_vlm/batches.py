"""Batches of encoded composites with questions on them.

Everything random in a batch depends on the seed, the stage and the step alone, so that a training
that was stopped continues with the batch that it had not seen. B, N, D as in `shards`; Q are the
questions on a composite, L the words of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.demo_vlm.processor import AFTER_QUESTION
from tools.photo_vlm.questions import Asker, Question
from tools.photo_vlm.shards import Encoded


@dataclass
class Batch:
    """What a step reads.

    Args:
        features: [B, N, D] float32. patches: [B, N] see `Encoded`.
        words: [B, Q, L] token numbers of question and answer, padded with 0.
        answer_at: [B, Q] the position of the answer in `words`. answer: [B, Q] its token number.
        kinds: of each question in turn.
    """

    features: Tensor
    patches: Tensor
    words: Tensor
    answer_at: Tensor
    answer: Tensor
    kinds: Sequence[str]


@dataclass(frozen=True)
class Listed:
    """An object as `Encoded.objects` has it."""

    category: str
    area: float
    centre: tuple[float, float]


def listed(table: Tensor, categories: Sequence[str]) -> list[Listed]:
    """The objects of a composite, [O, 4]."""
    rows = [row for row in table.tolist() if row[0] >= 0]
    return [Listed(categories[int(number)], area, (x, y)) for number, area, x, y in rows]


class Batches:
    """Draws batches.

    Args:
        encoded: composites, of which every one is read before any is read again.
        asker: of the questions.
        tokenizer: of the model.
        seed: of the whole training.
        stage: its number.
    """

    def __init__(
        self, encoded: Encoded, asker: Asker, tokenizer: Any, seed: int, stage: int
    ) -> None:
        self.encoded, self.asker, self.tokenizer = encoded, asker, tokenizer
        self._numbers = (seed, stage)

    def at(self, step: int, batch_size: int, questions: int, english: bool) -> Batch:
        """The batch of a step; without questions there are no words."""
        places = [self._place(n) for n in range(step * batch_size, (step + 1) * batch_size)]
        rng = np.random.default_rng([*self._numbers, step, 1])
        asked = [
            self.asker.ask(
                listed(self.encoded.objects[place], self.asker.categories), questions, rng
            )
            for place in places
        ]
        return self.collate(places, asked, english)

    def collate(
        self, places: Sequence[int], asked: Sequence[Sequence[Question]], english: bool
    ) -> Batch:
        """The composites at these places, each with as many questions as the others."""
        flat = [question for some in asked for question in some]
        numbers = [self._encode(question, english) for question in flat]
        longest = max(map(len, numbers), default=1)
        words = torch.zeros(len(flat), longest, dtype=torch.long)
        for row, found in zip(words, numbers, strict=True):
            row[: len(found)] = torch.tensor(found)
        shape = (len(places), len(flat) // len(places))
        at = torch.tensor([len(found) - 1 for found in numbers], dtype=torch.long)
        answer = torch.tensor([found[-1] for found in numbers], dtype=torch.long)
        return Batch(
            self.encoded.features[list(places)].float(),
            self.encoded.patches[list(places)].long(),
            words.reshape(*shape, longest),
            at.reshape(shape),
            answer.reshape(shape),
            [question.kind for question in flat],
        )

    def _encode(self, question: Question, english: bool) -> list[int]:
        text = f"{question.text} {AFTER_QUESTION}" if english else question.terse
        found = self.tokenizer(f"{text} {question.answer}", add_special_tokens=False)
        numbers: list[int] = found["input_ids"]
        return numbers

    def _place(self, number: int) -> int:
        epoch, within = divmod(number, len(self.encoded))
        order = np.random.default_rng([*self._numbers, epoch, 2]).permutation(len(self.encoded))
        return int(order[within])
