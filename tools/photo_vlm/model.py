"""The model around the tower: transformers' LlavaForConditionalGeneration, as the demo VLM's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from ocvtp.random_models.clip_config import plain_processor
from tools.demo_vlm.model import init_projector, llava_config, set_generation, text_config
from tools.demo_vlm.processor import llava_processor, word_tokenizer
from tools.photo_vlm.questions import words
from tools.photo_vlm.settings import ReaderSettings
from tools.photo_vlm.tower import processor_statistics


def build_model(vision: Any, settings: ReaderSettings, tokenizer: Any, seed: int) -> Any:
    """The model, in float32, with random weights, those of the tower too.

    Args:
        vision: `Dinov2Config` of the tower.
        settings: sizes.
        tokenizer: of the words of all questions.
        seed: of the weights; torch's own random numbers are not touched.
    """
    text = text_config(tokenizer, settings.text_dim, settings.text_layers, settings.num_heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(llava_config(vision, text, tokenizer))
        init_projector(model)
    set_generation(model, tokenizer)
    return model


def build_processor(tower: str | Path, size: int, patch: int, categories: Sequence[str]) -> Any:
    """A `LlavaProcessor` whose colours are those of the tower.

    Args:
        tower: folder that timm wrote.
        size: pixels of an edge.
        patch: the same of a patch.
        categories: that are asked for.
    """
    images = plain_processor(size)
    for name, value in processor_statistics(tower).items():
        setattr(images, name, value)
    return llava_processor(images, word_tokenizer(words(categories)), patch)
