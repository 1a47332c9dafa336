"""What the language model reads after the images: conversations, with the answers to be learnt.

L words of the longest conversation, Q conversations about the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocvtp.data.grounding import PROMPT, Box
from ocvtp.data.questions import WORDS
from ocvtp.data.several_images import ORDINALS
from tools.demo_vlm.batches import IGNORE
from tools.demo_vlm.processor import AFTER_QUESTION, word_tokenizer

STEP = 2
"""Pixels from one coordinate that the model can say to the next."""
BEFORE_QUESTION = "USER:"
_MOST = 96  # pixels of an edge of the demo VLM's images


@dataclass(frozen=True)
class Turn:
    """A question and its answer, which is a word, or four numbers where it is a `box`."""

    question: str
    answer: str
    box: bool = False


@dataclass
class Read:
    """Conversations as numbers.

    Args:
        words: [Q, L] token numbers, padded with 0.
        targets: [Q, L] the token that should follow each, `IGNORE` where nothing is learnt.
        boxes: [Q, L] bool, whether that is a coordinate.
    """

    words: Tensor
    targets: Tensor
    boxes: Tensor


def coordinates() -> list[str]:
    """All that the model can say of where an edge is, in order."""
    return [str(number) for number in range(0, _MOST + 1, STEP)]


def grounding_tokenizer() -> Any:
    """The demo VLM's, with the words that are new at its end."""
    said = PROMPT.lower().replace("{object}", " ").replace("?", " ").replace(".", " ").split()
    new = [*said, *ORDINALS[:2], *coordinates()]
    return word_tokenizer(tuple(dict.fromkeys([*WORDS, *new])))


def box_answer(box: Box) -> str:
    """The nearest box that the model can say: `24 36 46 58`."""
    return " ".join(str(STEP * round(edge / STEP)) for edge in box)


class ConversationEncoder:
    """Token numbers of conversations.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.eos_token_id
        self._known: dict[str, list[int]] = {}

    def __call__(self, conversations: Sequence[Sequence[Turn]], terse: bool = False) -> Read:
        """Every answer is learnt, and that nothing follows it.

        Args:
            conversations: of one prompt. terse: nothing stands between a question and its answer.
        """
        rows = [self._row(turns, "" if terse else f" {AFTER_QUESTION}") for turns in conversations]
        shape = len(rows), max(len(row) for row in rows)
        words = torch.zeros(shape, dtype=torch.long)
        targets, boxes = torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.bool)
        for number, row in enumerate(rows):
            word, target, box = zip(*row, strict=True)
            words[number, : len(row)] = torch.tensor(word)
            targets[number, : len(row)] = torch.tensor(target)
            boxes[number, : len(row)] = torch.tensor(box)
        return Read(words, targets, boxes)

    def _row(self, turns: Sequence[Turn], after: str) -> list[tuple[int, int, bool]]:
        """Of every token its number, the one to follow it, and whether that is a coordinate."""
        row: list[tuple[int, int, bool]] = []
        for number, turn in enumerate(turns):
            before = f"{BEFORE_QUESTION} " if number else ""
            asked = self._ids(f"{before}{turn.question}{after}")
            said = self._ids(turn.answer)
            row += [(word, IGNORE, False) for word in asked[:-1]]
            row += zip(
                [asked[-1], *said],
                [*said, self._end],
                [turn.box] * len(said) + [False],
                strict=True,
            )
        return row

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]
