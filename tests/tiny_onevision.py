"""A tiny random LLaVA-OneVision: like `tiny_next.tiny_next`, on a SigLIP tower."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import BOS, IMAGE_TOKEN, LLAVA_TEMPLATE, PAD, VOCABULARY, tiny_processor

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 224], [224, 224]]
"""Of tiles of the last two the model may resize the tokens: more than 9 tiles."""
VIDEO_TOKEN = 101


def tiny_onevision(image_size: int = 56, **settings: Any) -> Any:
    """LLaVA-OneVision on tiles of 56 pixels: 16 tokens a tile."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=2,
    )
    settings = {
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_9",
    } | settings
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        attn_implementation="sdpa",
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():  # weights of the usual size make so small a model nearly blind
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = None  # answers run to their full length
    return model.eval()


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
