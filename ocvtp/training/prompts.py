"""Questions and answers as a model reads them, in its own chat template.

B questions, one image each, L columns, h x w pixels of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.prompt.chat_template import (
    find_tokenizer,
    image_placeholder,
    special_tokens,
    with_turns,
)


class PromptTransform:
    """Makes a batch of items of a `QuestionSet`.

    A prompt is the one that the model is asked with, to the token; the answer and the end of the
    model's turn follow it. Rows are padded on the right.

    Args:
        processor: of the model.

    Raises:
        ValueError: if it has no tokenizer, or one without a token that ends a text.
    """

    def __init__(self, processor: Any) -> None:
        tokenizer = find_tokenizer(processor)
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise ValueError(
                f"{type(processor).__name__} has no tokenizer with an eos_token; pass the processor"
                " of a vision-language model, whose answers end with one."
            )
        self.processor = processor
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._placeholder = image_placeholder(processor)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch.

        Args:
            items: see `ocvtp.data.question_sets.QuestionSet`.

        Returns:
            `inputs`, the processor's tensors of the B readable items (none if there is none);
            `answers` [B, L] bool, True on the tokens of the answer and on the one that ends it;
            `objects`, for each [h, w] bool, whether the question is about an object there, or None
            where nobody says; `sizes`, (h, w) of each image; `keys`; `errors`, `FILE: reason` of
            the items that are not readable.

        Raises:
            ValueError: if a text has the placeholder of an image.
        """
        good = [item for item in items if "error" not in item]
        inputs, answers = self._read(good) if good else ({}, torch.zeros(0, 0, dtype=torch.bool))
        return {
            "inputs": inputs,
            "answers": answers,
            "objects": [None if i["masks"] is None else i["masks"].any(axis=0) for i in good],
            "sizes": [item["image"].size[::-1] for item in good],
            "keys": [item["key"] for item in good],
            "errors": [item["error"] for item in items if "error" in item],
        }

    def _read(self, items: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs, and where they have answers."""
        prompts, answers = [], []
        for item in items:
            turns = (*item["before"], item["question"])
            if any(self._placeholder in text for text in (*turns, item["answer"])):
                raise ValueError(
                    f"question {item['key']} has {self._placeholder!r} in its text, which stands"
                    " for an image; take it out: the image comes before the first question."
                )
            prompts.append(with_turns(self.processor, turns, 1))
            answers.append(self._answer(prompts[-1], turns, item["answer"].strip()))
        made = self.processor(
            images=[[item["image"]] for item in items],
            text=prompts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
        )
        return self._answered(dict(made), answers)

    def _answer(self, prompt: str, turns: Sequence[str], answer: str) -> list[int]:
        """The tokens after a prompt: the answer as the template writes it, and its end."""
        whole = with_turns(self.processor, (*turns, answer), 1)
        rest = whole.removeprefix(prompt) if whole.startswith(prompt) else ""
        lead, found, tail = rest.partition(answer)
        before, text = prompt, f"{lead}{answer}" if found else answer
        asked, both = self._ids(before), self._ids(before + text)
        is_apart = both[: len(asked)] == asked
        tokens = both[len(asked) :] if is_apart else self._ids(answer)
        ends = [token for token in self._ids(tail) if token in self._special]
        return [*tokens, ends[0] if ends else self._tokenizer.eos_token_id]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _answered(
        self, made: dict[str, Tensor], answers: Sequence[list[int]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Rows that go on with these tokens; what else there is of every column goes on with 0."""
        ids, mask = made["input_ids"], made["attention_mask"]
        starts = mask.sum(dim=1).tolist()
        ends = [start + len(answer) for start, answer in zip(starts, answers, strict=True)]
        grown = (len(ids), max(*ends, ids.shape[1]) - ids.shape[1])
        for name, values in made.items():
            if values.shape == ids.shape:
                made[name] = torch.cat([values, values.new_zeros(grown)], dim=1)
        pad_id = self._tokenizer.pad_token_id
        answered = torch.zeros_like(made["input_ids"], dtype=torch.bool)
        for row, (start, end, answer) in enumerate(zip(starts, ends, answers, strict=True)):
            made["input_ids"][row, start:end] = torch.tensor(answer)
            made["input_ids"][row, end:] = 0 if pad_id is None else pad_id
            made["attention_mask"][row, start:end] = 1
            answered[row, start:end] = True
        return made, answered
