"""A tiny random LLaVA-OneVision: like `tiny_next.tiny_next`, on a SigLIP tower."""

from __future__ import annotations

from typing import Any

from tiny_models import IMAGE_TOKEN, LLAVA_TEMPLATE, TEXT, random_model, tiny_processor

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 224], [224, 224]]
"""Of tiles of the last two the model may resize the tokens: more than 9 tiles."""
VIDEO_TOKEN = 101


def tiny_onevision(image_size: int = 56, **settings: Any) -> Any:
    """LLaVA-OneVision on tiles of 56 pixels: 16 tokens a tile."""
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
        vision_use_head=False,
    )
    ratios = {"image_grid_pinpoints": PINPOINTS, "vision_aspect_ratio": "anyres_max_9"}
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        attn_implementation="sdpa",
        **ratios | settings,
    )
    return random_model(config)


def tiny_onevision_processor() -> Any:
    """The processor of `tiny_onevision`: a token for every character."""
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    size = {"height": 56, "width": 56}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tiny_processor().tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )
