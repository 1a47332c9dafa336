"""What models are asked while they are timed: cells of a grid, their images and prompts.

Weights may be random and answers are as long as they are told to be, so only sizes matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

from ocvtp.hosts.base import Host
from ocvtp.hosts.prompt.chat_template import find_tokenizer, with_template

_WORDS = "Look at the image closely and describe what you see in it, one thing after the other. "


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Args:
        batch_size: requests at a time.
        text_length: tokens of a prompt beside its image tokens.
        images_per_prompt: of each request.
    """

    batch_size: int = 1
    text_length: int = 64
    images_per_prompt: int = 1

    @property
    def key(self) -> str:
        """Names it among the others."""
        return f"batch{self.batch_size}-text{self.text_length}-images{self.images_per_prompt}"

    def __str__(self) -> str:
        images = "" if self.images_per_prompt == 1 else f", {self.images_per_prompt} images each"
        return f"batch {self.batch_size}, {self.text_length} text tokens{images}"


def grid(
    batch_sizes: Sequence[int], text_lengths: Sequence[int], images_per_prompt: Sequence[int]
) -> list[Cell]:
    """All combinations, each once.

    Raises:
        ValueError: for what is below 1.
    """
    for name, values in (
        ("batch-size", batch_sizes),
        ("text-length", text_lengths),
        ("images-per-prompt", images_per_prompt),
    ):
        if min(values) < 1:
            raise ValueError(f"--{name} {min(values)}; pass at least 1.")
    cells = product(batch_sizes, text_lengths, images_per_prompt)
    return list(dict.fromkeys(Cell(*sizes) for sizes in cells))


@dataclass(frozen=True)
class Request:
    """The images and prompts of a cell, as a user has them.

    Args:
        images: of each prompt its pictures. texts: with the chat template around them.
    """

    images: list[list[Image.Image]]
    texts: list[str]

    def prepare(self, processor: Any, model: Any) -> Any:
        """The processor's tensors, on the model's device."""
        made = processor(images=self.images, text=self.texts, return_tensors="pt", padding=True)
        return made.to(model.device, model.dtype)


def make_request(cell: Cell, processor: Any, image_size: tuple[int, int]) -> Request:
    """Different pictures, and the same words for all of a batch.

    Args:
        cell: the sizes.
        processor: of the model.
        image_size: width and height of the pictures.

    Raises:
        ValueError: if the chat template alone is longer than `text_length`.
    """
    tokenizer = find_tokenizer(processor)
    count = cell.images_per_prompt

    def length(question: str) -> int:
        """Text tokens of the prompt; every image is one placeholder here."""
        return len(tokenizer(with_template(processor, question, count)).input_ids) - count

    least = length("")
    if cell.text_length < least:
        raise ValueError(
            f"--text-length {cell.text_length}: the model's chat template alone is {least} tokens;"
            f" pass at least {least}."
        )
    words = _WORDS * (1 + 8 * cell.text_length // len(_WORDS))
    low, high = 0, len(words)
    while low < high:  # the shortest beginning of the words that is long enough
        middle = (low + high) // 2
        if length(words[:middle]) < cell.text_length:
            low = middle + 1
        else:
            high = middle
    text = with_template(processor, words[:low], count)
    pictures = _pictures(cell.batch_size * count, image_size)
    rows = [pictures[start : start + count] for start in range(0, len(pictures), count)]
    return Request(rows, [text] * cell.batch_size)


def tokens_of(host: Host, inputs: Any) -> dict[str, int]:
    """Image tokens and text tokens of the first prompt of a batch, padding apart."""
    ids, mask = inputs["input_ids"][0], inputs["attention_mask"][0].bool()
    images = int((ids == host.image_token_id).sum())
    return {"image_tokens": images, "text_tokens": int(mask.sum()) - images}


def _pictures(count: int, size: tuple[int, int]) -> list[Image.Image]:
    """Soft random colours, always the same."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, size=(count, 12, 12, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in coarse]
