"""Questions with answers about small pictures, for a tiny model of every family."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ocvtp.choices import FAMILIES
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.chat_template import with_template

HOSTS = tuple(FAMILIES)
SAID = (("What is this, please?", "A dog."), ("Where?", "Over there."), ("How many?", "9"))


@cache
def tiny(name: str) -> tuple[Any, Any]:
    """A frozen model of random weights, and its processor."""
    model, processor = load_model(f"random:tiny-{name}", "float32")
    return model.requires_grad_(False), processor


def picture(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """Noise of some width and height."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def questions(
    name: str,
    said: Any = SAID,
    side: str = "right",
    sizes: Any = ((120, 90), (90, 120), (150, 60)),
    pictures: Any = (0, 1, 2),
) -> tuple[dict[str, Any], Tensor]:
    """What a processor returns of prompts and answers, and [B, L] where the answers are."""
    _, processor = tiny(name)
    shown = [picture(number, sizes[number]) for number in pictures[: len(said)]]
    texts = [with_template(processor, question, 1) + answer for question, answer in said]
    settings = {"return_tensors": "pt", "padding": True, "padding_side": side}
    inputs = dict(processor(images=shown, text=texts, **settings))
    answers = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, (_, answer) in enumerate(said):
        end = int(inputs["attention_mask"][row].nonzero()[-1]) + 1
        answers[row, end - len(answer) : end] = True  # a token for every character
    return inputs, answers
