"""A tiny random InternVL: tiles of 56 pixels, 8 x 8 patches, 16 tokens."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import IMAGE_TOKEN, TEXT, random_model

IMG_START, IMG_END = 101, 102


def tiny_internvl(vision: dict[str, Any] | None = None, **settings: Any) -> Any:
    """InternVL with a tower of 4 layers, whose queries and keys are normed, and 3 decoder layers.

    Args:
        vision: further settings of the tower.
        settings: of the model.
    """
    from transformers import InternVLConfig

    tower = {
        "image_size": 56,
        "patch_size": 7,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "use_qk_norm": True,
        "layer_scale_init_value": 0.5,
    }
    config = InternVLConfig(
        vision_config=tower | (vision or {}),
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=16,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        **settings,
    )
    model = random_model(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what a fresh tower has all equal
        for name, parameter in model.model.vision_tower.named_parameters():
            if name.endswith(("position_embeddings", "cls_token")):
                parameter.normal_(generator=random)
            elif name.endswith(("norm.weight", "lambda_1", "lambda_2")):
                parameter.mul_(torch.rand(parameter.shape, generator=random) + 0.5)
    return model
