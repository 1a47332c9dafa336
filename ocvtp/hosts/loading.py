"""Models and processors by name: a folder, a hub id, or random weights that need no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from ocvtp.hosts import random_internvl, random_llava, random_qwen
from ocvtp.hosts.random_tokenizer import byte_tokenizer

_RANDOM: dict[str, tuple[Callable[[Any], tuple[Any, Any]], dict[str, str]]] = {
    "random:tiny-llava": (random_llava.tiny_llava, random_llava.SPECIAL_TOKENS),
    "random:tiny-llava-next": (random_llava.tiny_llava_next, random_llava.SPECIAL_TOKENS),
    "random:tiny-llava-onevision": (random_llava.tiny_onevision, random_llava.SPECIAL_TOKENS),
    "random:tiny-internvl": (random_internvl.tiny_internvl, random_internvl.SPECIAL_TOKENS),
    "random:tiny-qwen2-vl": (random_qwen.tiny_qwen2, random_qwen.SPECIAL_TOKENS),
    "random:tiny-qwen2.5-vl": (random_qwen.tiny_qwen, random_qwen.SPECIAL_TOKENS),
    "random:tiny-qwen3-vl": (random_qwen.tiny_qwen3, random_qwen.SPECIAL_TOKENS),
}
RANDOM_MODELS = tuple(_RANDOM)


def load_model(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """A vision-language model in evaluation mode, and its processor.

    Args:
        name: folder or hub id, or one of `RANDOM_MODELS` (random weights, meaningless answers).
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        device: e.g. `cpu`, `cuda`.

    Raises:
        ValueError: if there is no such model.
    """
    if name.startswith("random:"):
        model, processor = _random_model(name)
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model={name!r} cannot be loaded ({' '.join(str(error).split())[:300]}); pass a"
                f" folder or hub id of a vision-language model, or one of {list(RANDOM_MODELS)}."
            ) from error
    if dtype != "auto":
        model = model.to(getattr(torch, dtype))
    return model.to(device).eval(), processor


def open_image(path: str) -> Image.Image:
    """An image file in RGB.

    Raises:
        ValueError: if it is missing or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"image {path!r} cannot be read ({error}); pass a JPEG or PNG.") from error


def _random_model(name: str) -> tuple[Any, Any]:
    if name not in _RANDOM:
        raise ValueError(f"{name!r} is unknown; random models are {list(RANDOM_MODELS)}.")
    build, special_tokens = _RANDOM[name]
    return build(byte_tokenizer(special_tokens))
