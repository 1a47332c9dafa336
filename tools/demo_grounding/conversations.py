"""What the language model reads after the image: conversations, with the answers to be learnt.

L words of the longest conversation, Q conversations about the same image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocvtp.data.grounding import PROMPT, Box
from ocvtp.data.questions import WORDS
from tools.demo_vlm.batches import IGNORE
from tools.demo_vlm.processor import AFTER_QUESTION, word_tokenizer

STEP = 4
"""Pixels from one coordinate that the model can say to the next."""
BEFORE_QUESTION = "USER:"
_MOST = 96  # pixels of an edge of the demo VLM's images


@dataclass(frozen=True)
class Turn:
    """A question and its answer: a word, or four numbers where it is the box of object `about`."""

    question: str
    answer: str
    about: int = IGNORE


@dataclass
class Read:
    """Conversations as numbers.

    Args:
        words: [Q, L] token numbers, padded with 0.
        targets: [Q, L] the token that should follow each, `IGNORE` where nothing is learnt.
        about: [Q, L] the number of the object of which that is a coordinate, `IGNORE` where it is
            none.
        names: [Q, L] the number of the object whose box is asked for, where its name ends; else
            `IGNORE`.
    """

    words: Tensor
    targets: Tensor
    about: Tensor
    names: Tensor


def coordinates() -> list[str]:
    """All that the model can say of where an edge is, in order."""
    return [str(number) for number in range(0, _MOST + 1, STEP)]


def grounding_tokenizer() -> Any:
    """The demo VLM's, with the words that are new at its end."""
    said = PROMPT.lower().replace("{object}", " ").replace("?", " ").replace(".", " ").split()
    new = [*said, *coordinates()]
    return word_tokenizer(tuple(dict.fromkeys([*WORDS, *new])))


def box_answer(box: Box) -> str:
    """The nearest box that the model can say: `24 36 48 56`."""
    return " ".join(str(STEP * round(edge / STEP)) for edge in box)


class ConversationEncoder:
    """Token numbers of conversations.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.eos_token_id
        self._mark = tokenizer.convert_tokens_to_ids("?")
        self._known: dict[str, list[int]] = {}

    def __call__(self, conversations: Sequence[Sequence[Turn]]) -> Read:
        """Every answer is learnt, and that nothing follows it.

        Args:
            conversations: about one image.
        """
        rows = [self._row(turns) for turns in conversations]
        shape = len(rows), max(len(row) for row in rows)
        filled = [torch.full(shape, fill) for fill in (0, IGNORE, IGNORE, IGNORE)]
        for number, row in enumerate(rows):
            for part, values in zip(filled, zip(*row, strict=True), strict=True):
                part[number, : len(row)] = torch.tensor(values)
        return Read(*filled)

    def _row(self, turns: Sequence[Turn]) -> list[tuple[int, int, int, int]]:
        """Of every token what `Read` tells of it."""
        row: list[tuple[int, int, int, int]] = []
        for number, turn in enumerate(turns):
            before = f"{BEFORE_QUESTION} " if number else ""
            asked = self._ids(f"{before}{turn.question} {AFTER_QUESTION}")
            said = self._ids(turn.answer)
            name = asked.index(self._mark) - 1
            row += [
                (word, IGNORE, IGNORE, turn.about if place == name else IGNORE)
                for place, word in enumerate(asked[:-1])
            ]
            row += zip(
                [asked[-1], *said],
                [*said, self._end],
                [turn.about] * len(said) + [IGNORE],
                [IGNORE] * (len(said) + 1),
                strict=True,
            )
        return row

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]
