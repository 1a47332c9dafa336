"""A CLIP of random weights and its tokenizer: needs no download, its texts mean nothing."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp.random_models.byte_tokenizer import byte_tokenizer
from ocvtp.random_models.clip_config import random_tower, vision_config

RANDOM_CLIPS = ("random:tiny",)


def random_clip(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A whole CLIP of random weights around the tower `random:tiny`, and its tokenizer.

    Its texts mean nothing: it lets pruners that read them run on `random:tiny-llava`.

    Raises:
        ValueError: for other names.
    """
    from transformers import CLIPConfig, CLIPModel

    if name not in RANDOM_CLIPS:
        raise ValueError(f"text_tower={name!r} is unknown; random ones are {list(RANDOM_CLIPS)}.")
    tokenizer = byte_tokenizer({})
    vision = vision_config(name)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "initializer_factor": 2.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config=text, vision_config=vision.to_dict(), projection_dim=vision.projection_dim
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    model.vision_model.load_state_dict(random_tower(vision, seed).state_dict())
    return model.eval(), tokenizer
