"""LLaVA models of random weights and their processors: need no download, answers mean nothing."""

from __future__ import annotations

from typing import Any

from ocvtp.random_models.clip_config import plain_processor, random_tower, vision_config
from ocvtp.random_models.weights import materialise

SPECIAL_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_BEHIND_CLIP = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}


def tiny_llava(tokenizer: Any, seed: int = 0) -> tuple[Any, Any]:
    """A LLaVA-1.5 of 0.5 M random weights after the tower `random:tiny`, and its processor."""
    from transformers import LlavaConfig, LlavaProcessor

    vision = vision_config("random:tiny")
    side = vision.image_size // vision.patch_size
    settings = {"image_seq_length": side * side, **_BEHIND_CLIP}
    model = _model(LlavaConfig, vision, tokenizer, seed, settings)
    model.model.vision_tower.load_state_dict(random_tower(vision, seed).state_dict())
    images = plain_processor(vision.image_size)
    return model, clip_processor(LlavaProcessor, images, tokenizer, vision)


def tiny_llava_next(tokenizer: Any, seed: int = 0) -> tuple[Any, Any]:
    """The same as a LLaVA-NeXT: a base view and up to four tiles."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    vision = vision_config("random:tiny")
    side = vision.image_size
    tiles = [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]]
    grid = {"image_grid_pinpoints": [[rows * side, columns * side] for rows, columns in tiles]}
    images = LlavaNextImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **grid
    )
    settings = {**grid, **_BEHIND_CLIP}
    model = _model(LlavaNextConfig, vision, tokenizer, seed, settings)
    model.model.vision_tower.load_state_dict(random_tower(vision, seed).state_dict())
    return model, clip_processor(LlavaNextProcessor, images, tokenizer, vision)


def tiny_onevision(tokenizer: Any, seed: int = 0) -> tuple[Any, Any]:
    """A LLaVA-OneVision of 0.6 M random weights after a SigLIP tower, and its processor.

    A base view of 8 x 8 tokens and up to 12 tiles; of more than 4 it resizes the tokens.
    """
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        SiglipVisionConfig,
    )

    side, ratio = 112, "anyres_max_4"
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=side,
        patch_size=14,
        vision_use_head=False,
    )
    pairs = [(rows, columns) for rows in range(1, 5) for columns in range(1, 4)]
    tiles = {"image_grid_pinpoints": [[rows * side, columns * side] for rows, columns in pairs]}
    settings = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": ratio,
        "video_token_id": tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS["video_token"]),
        **tiles,
    }
    model = _model(LlavaOnevisionConfig, vision, tokenizer, seed, settings)
    size = {"height": side, "width": side}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, **tiles),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=(side // 14) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=ratio,
        chat_template=_CHAT_TEMPLATE,
    )
    return model, processor


def _model(
    config_class: Any, vision: Any, tokenizer: Any, seed: int, settings: dict[str, Any]
) -> Any:
    from transformers import LlamaConfig

    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    config = config_class(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **settings,
    )
    return materialise(config, seed=seed)


def clip_processor(
    processor_class: Any,
    images: Any,
    tokenizer: Any,
    vision: Any,
    chat_template: str | None = _CHAT_TEMPLATE,
    **settings: Any,
) -> Any:
    """A family's own processor around a tokenizer, for a CLIP tower of these settings."""
    return processor_class(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
        **settings,
    )
