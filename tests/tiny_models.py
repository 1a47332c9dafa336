"""Tiny random models: made from configs, without a network, in tens of milliseconds."""

from __future__ import annotations

from typing import Any

import torch

IMAGE_TOKEN, PAD, BOS, VOCABULARY = 100, 0, 1, 128


def tiny_llava(tower: str, **settings: Any) -> Any:
    """LLaVA-1.5 on 56 pixels: 16 tokens an image, a `clip` or `siglip` tower, 3 decoder layers."""
    strategy = "default" if tower == "clip" else "full"
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": strategy} | settings
    return _llava(_vision(tower), **settings)


def _vision(family: str) -> Any:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": 56, "patch_size": 14}
    sizes |= {"num_hidden_layers": 6, "num_attention_heads": 4}
    if family == "clip":
        return CLIPVisionConfig(**sizes, projection_dim=32)
    return SiglipVisionConfig(**sizes, vision_use_head=False)


def _llava(vision: Any, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

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
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=16,
        attn_implementation="sdpa",
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # weights of the usual size make so small a model nearly blind
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = None  # answers run to their full length
    return model.eval()
