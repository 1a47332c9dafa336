"""The demo VLM: transformers' LlavaForConditionalGeneration of small sizes and random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tools.demo_vlm.settings import ModelSettings

FEATURE_LAYER = -2
_EMBEDDING_STD = 0.06
_PATCH_STD = 0.07


def build_model(settings: ModelSettings, tokenizer: Any, seed: int) -> Any:
    """The model, in float32; seeded, without touching torch's own random numbers."""
    side = settings.side
    vision = CLIPVisionConfig(
        hidden_size=settings.tower_dim,
        intermediate_size=3 * settings.tower_dim,
        num_hidden_layers=settings.tower_layers,
        num_attention_heads=settings.num_heads,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        projection_dim=settings.tower_dim,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.text_dim,
        intermediate_size=int(2.75 * settings.text_dim) // 8 * 8,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=_EMBEDDING_STD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=side * side,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        patches = find_patch_embedding(model.model.vision_tower)
        nn.init.normal_(patches.weight, std=_PATCH_STD)
        second = model.model.multi_modal_projector.linear_2
        nn.init.normal_(second.weight, std=settings.text_dim**-0.5)
    generation = model.generation_config
    generation.bos_token_id, generation.pad_token_id = tokenizer.bos_token_id, 0
    generation.eos_token_id, generation.max_new_tokens = tokenizer.eos_token_id, 4
    generation.do_sample = False
    return model


def find_patch_embedding(tower: nn.Module) -> nn.Conv2d:
    """The convolution that cuts an image into patches."""
    return next(module for module in tower.modules() if isinstance(module, nn.Conv2d))


def orthogonal_attention(model: Any, generator: torch.Generator, scale: float = 1.2) -> None:
    """Give every layer of the language model W_q = W_k = `scale` times an orthogonal matrix.

    Equal inputs then attend to each other from the start, so that a word finds its patches.
    """
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
            noise = torch.randn(query.shape, generator=generator)
            matrix = scale * torch.linalg.qr(noise)[0]
            query.copy_(matrix)
            key.copy_(matrix)
