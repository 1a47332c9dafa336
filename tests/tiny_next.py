"""A tiny random LLaVA-NeXT: like `tiny_models.tiny_llava`, in tiles."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import (
    BOS,
    IMAGE_TOKEN,
    LLAVA_TEMPLATE,
    PAD,
    VOCABULARY,
    tiny_processor,
)

PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168], [168, 56]]


def tiny_next(tower: str = "clip", **settings: Any) -> Any:
    """LLaVA-NeXT on tiles of 56 pixels: 16 tokens a tile, a `clip` or `siglip` tower."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        SiglipVisionConfig,
    )

    sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": 56, "patch_size": 14}
    sizes |= {"num_hidden_layers": 6, "num_attention_heads": 4}
    if tower == "clip":
        vision: Any = CLIPVisionConfig(**sizes, projection_dim=32)
    else:
        vision = SiglipVisionConfig(**sizes, vision_use_head=False)
    text = LlamaConfig(
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
    settings = {"image_grid_pinpoints": PINPOINTS} | settings
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        attn_implementation="sdpa",
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():  # weights of the usual size make so small a model nearly blind
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = None  # answers run to their full length
    return model.eval()


def tiny_next_processor(**settings: Any) -> Any:
    """The processor of `tiny_next`: a token for every character."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    images = LlavaNextImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tiny_processor().tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
        **settings,
    )
