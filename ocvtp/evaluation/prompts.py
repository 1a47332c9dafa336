"""The prompts of items as a model reads them: with the images of each, and what was said before.

B rows, L columns of the prompts, T of what follows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocvtp.evaluation.tasks.base import Item, Task
from ocvtp.hosts.prompt.chat_template import with_template, with_turns
from ocvtp.transformers_names import cache_name, cache_of


@dataclass(frozen=True, eq=False)
class Prompts:
    """What is asked of a model in one batch.

    Args:
        first: the processor's tensors. later: [B, T] token numbers that follow them in the rows
            that go on, padded on the left; None where nothing does.
        mask: [B, T] 0 on padding. goes_on: of each row, whether it does.
    """

    first: Any
    later: Tensor | None = None
    mask: Tensor | None = None
    goes_on: Sequence[bool] = ()


def make_prompts(
    processor: Any,
    task: Task,
    items: Sequence[Item],
    owners: Sequence[int],
    device: Any,
    dtype: Any,
) -> Prompts:
    """The prompts of items.

    Args:
        processor: of the model.
        task: of the items.
        items: a row each. owners: whose images each row shows.
        device: of the tensors. dtype: of pixels.

    Raises:
        ValueError: if the chat template does not write a conversation as one that goes on.
    """
    shown = [task.shown(owner) for owner in owners]
    images = {number: task.image(number) for numbers in shown for number in numbers}
    talks = [(*item.before, item.question) for item in items]
    start = [talk[:1] if task.keeps_cache else talk for talk in talks]
    counts = [len(numbers) for numbers in shown]
    texts = [prompt_text(processor, t, n) for t, n in zip(start, counts, strict=True)]
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.padding_side = "left"
    made = processor(
        images=[[images[number] for number in numbers] for numbers in shown],
        text=texts,
        return_tensors="pt",
        padding=True,
    )
    first = made.to(device, dtype)
    goes_on = [len(whole) > len(part) for whole, part in zip(talks, start, strict=True)]
    if not any(goes_on):
        return Prompts(first)
    rest = [
        _rest(prompt_text(processor, talk, n), text)
        for talk, n, text in zip(talks, counts, texts, strict=True)
    ]
    rows = [(tokenizer or processor)(text, add_special_tokens=False).input_ids for text in rest]
    width = max(map(len, rows))
    later, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for row, ids in enumerate(rows):
        if ids:
            later[row, -len(ids) :] = torch.tensor(ids)
            mask[row, -len(ids) :] = 1
    return Prompts(first, later.to(device), mask.long().to(device), goes_on)


def prompt_text(processor: Any, talk: Sequence[str], num_images: int) -> str:
    """A conversation in the model's chat template, up to where the model answers.

    Args:
        processor: of the model.
        talk: a question; or what was said before, and it. num_images: before the first of them.
    """
    if len(talk) == 1:
        return with_template(processor, talk[0], num_images)
    return with_turns(processor, talk, num_images)


def _rest(whole: str, text: str) -> str:
    """What a conversation says after its first prompt."""
    if not whole.startswith(text):
        raise ValueError(
            "this model's chat template writes the first turn of a conversation in another way when"
            " others follow, so that its KV cache cannot be kept; pass --no-cache."
        )
    return whole[len(text) :]


def answers(model: Any, processor: Any, prompts: Prompts, max_new_tokens: int) -> list[str]:
    """What a model says to prompts, greedily; a pruner may be attached to it."""
    first, length = prompts.first, {"do_sample": False, "max_new_tokens": max_new_tokens}
    found = [""] * len(first["input_ids"])
    if not prompts.goes_on or not all(prompts.goes_on):
        made = model.generate(**first, **length)
        found = _texts(processor, made[:, first["input_ids"].shape[1] :])
    if prompts.later is None:
        return found
    assert prompts.mask is not None
    filled = model.generate(
        **first, do_sample=False, max_new_tokens=1, return_dict_in_generate=True
    )
    ids = torch.cat([first["input_ids"], prompts.later], dim=1)
    mask = torch.cat([first["attention_mask"], prompts.mask], dim=1)
    for row, goes_on in enumerate(prompts.goes_on):
        if not goes_on:  # a row of padding cannot be read; its answer is known
            mask[row, -1] = 1
    cache = {cache_name(): cache_of(filled)}
    made = model.generate(input_ids=ids, attention_mask=mask, **cache, **length)
    later = _texts(processor, made[:, ids.shape[1] :])
    triples = zip(found, later, prompts.goes_on, strict=True)
    return [text if goes_on else own for own, text, goes_on in triples]


def _texts(processor: Any, made: Tensor) -> list[str]:
    said = processor.batch_decode(made, skip_special_tokens=True)
    return [text.strip() for text in said]
