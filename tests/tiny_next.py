"""A tiny random LLaVA-NeXT: like `tiny_models.tiny_llava`, in tiles."""

from __future__ import annotations

from typing import Any

from tiny_models import (
    IMAGE_TOKEN,
    LLAVA_TEMPLATE,
    TEXT,
    random_model,
    tiny_processor,
    tiny_vision,
)

from ocvtp.random_models.tiny_llava import clip_processor

PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168], [168, 56]]


def tiny_next(tower: str = "clip", registers: int | None = None, **settings: Any) -> Any:
    """LLaVA-NeXT on tiles of 56 pixels: 16 tokens a tile, a tower of `tiny_vision`."""
    from transformers import LlamaConfig, LlavaNextConfig

    vision = tiny_vision(tower)
    if registers is not None and hasattr(vision, "num_register_tokens"):
        vision.num_register_tokens = registers
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        attn_implementation="sdpa",
        **{"image_grid_pinpoints": PINPOINTS} | settings,
    )
    return random_model(config)


def tiny_next_processor(**settings: Any) -> Any:
    """The processor of `tiny_next`: a token for every character."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    images = LlavaNextImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=PINPOINTS,
    )
    tokenizer, vision = tiny_processor().tokenizer, tiny_vision("clip")
    return clip_processor(LlavaNextProcessor, images, tokenizer, vision, LLAVA_TEMPLATE, **settings)
