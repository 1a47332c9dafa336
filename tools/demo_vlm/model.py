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
    text = text_config(tokenizer, settings.text_dim, settings.text_layers, settings.num_heads)
    config = llava_config(vision, text, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        patches = find_patch_embedding(model.model.vision_tower)
        nn.init.normal_(patches.weight, std=_PATCH_STD)
        init_projector(model)
    set_generation(model, tokenizer)
    return model


def text_config(tokenizer: Any, dim: int, layers: int, num_heads: int) -> LlamaConfig:
    """Settings of a Llama with tied embeddings of a tokenizer's words."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=int(2.75 * dim) // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=_EMBEDDING_STD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def llava_config(vision: Any, text: LlamaConfig, tokenizer: Any) -> LlavaConfig:
    """Settings of a LLaVA that reads every patch of the tower's last layer but one."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def init_projector(model: Any) -> None:
    """Draw the projector's second layer, so that tokens are as large as its input."""
    second = model.model.multi_modal_projector.linear_2
    nn.init.normal_(second.weight, std=second.in_features**-0.5)


def set_generation(model: Any, tokenizer: Any) -> None:
    """Answers of a few words, greedily."""
    generation = model.generation_config
    generation.bos_token_id, generation.pad_token_id = tokenizer.bos_token_id, 0
    generation.eos_token_id, generation.max_new_tokens = tokenizer.eos_token_id, 4
    generation.do_sample = False


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
