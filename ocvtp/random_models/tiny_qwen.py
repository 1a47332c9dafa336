"""Models of the Qwen-VL family with random weights: need no download, answers mean nothing."""

from __future__ import annotations

from typing import Any

from ocvtp.random_models.weights import materialise

SPECIAL_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "turn_bos_token": "<|im_start|>",
    "turn_eos_token": "<|im_end|>",
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VISION = {
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "depth": 6,
    "num_heads": 4,
    "initializer_range": 0.2,
}
_ROPE = {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 1e4}
_TEXT = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": _ROPE,
    "initializer_range": 0.2,
}
_MOST_TOKENS = 144  # of an image


def tiny_qwen(tokenizer: Any, seed: int = 0) -> tuple[Any, Any]:
    """A Qwen2.5-VL of 0.7 M weights for images of up to 144 visual tokens, and its processor.

    Args:
        tokenizer: one that has `SPECIAL_TOKENS`.
        seed: of the weights.
    """
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
    )

    vision = {"patch_size": 14, "hidden_size": 64, "out_hidden_size": 96, "intermediate_size": 192}
    windows = {"window_size": 112, "fullatt_block_indexes": [2, 5]}
    model = _model(Qwen2_5_VLConfig, vision | windows, {}, tokenizer, seed)
    return model, processor(Qwen2_5_VLProcessor, tokenizer, patch=14)


def tiny_qwen2(tokenizer: Any, seed: int = 0) -> tuple[Any, Any]:
    """The same as a Qwen2-VL: a tower without windows."""
    from transformers import Qwen2VLConfig, Qwen2VLProcessor

    vision = {"patch_size": 14, "embed_dim": 64, "hidden_size": 96, "mlp_ratio": 3}
    model = _model(Qwen2VLConfig, vision, {}, tokenizer, seed)
    return model, processor(Qwen2VLProcessor, tokenizer, patch=14)


def tiny_qwen3(tokenizer: Any, seed: int = 0) -> tuple[Any, Any]:
    """The same as a Qwen3-VL: two layers of the tower are added to the language model's states."""
    from transformers import Qwen3VLConfig, Qwen3VLProcessor

    vision = {"patch_size": 16, "hidden_size": 64, "out_hidden_size": 96, "intermediate_size": 192}
    deepstack = {"num_position_embeddings": 12**2, "deepstack_visual_indexes": [1, 3]}
    text = {"head_dim": 24, "rope_parameters": _ROPE | {"mrope_interleaved": True}}
    model = _model(Qwen3VLConfig, vision | deepstack, text, tokenizer, seed)
    colours: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return model, processor(Qwen3VLProcessor, tokenizer, patch=16, **colours)


def _model(
    config_class: Any, vision: dict[str, Any], text: dict[str, Any], tokenizer: Any, seed: int
) -> Any:
    ids = token_ids(tokenizer)
    config = config_class(
        vision_config=_VISION | vision,
        text_config={**_TEXT, **text, **ids["text"], "vocab_size": len(tokenizer)},
        **ids["whole"],
    )
    return materialise(config, seed=seed)


def token_ids(tokenizer: Any) -> dict[str, dict[str, int]]:
    """Ids of special tokens by the setting that names them: of the `text` model, of the `whole`."""
    ids = {name: tokenizer.convert_tokens_to_ids(t) for name, t in SPECIAL_TOKENS.items()}
    return {
        "text": {
            "eos_token_id": ids["turn_eos_token"],
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        "whole": {
            "image_token_id": ids["image_token"],
            "video_token_id": ids["video_token"],
            "vision_start_token_id": ids["vision_bos_token"],
            "vision_end_token_id": ids["vision_eos_token"],
        },
    }


def processor(
    processor_class: Any,
    tokenizer: Any,
    patch: int,
    most_tokens: int = _MOST_TOKENS,
    **colours: Any,
) -> Any:
    """A family's own processor around a tokenizer, for images of 4 to `most_tokens` tokens."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    unit = 2 * patch
    size = {"shortest_edge": 4 * unit**2, "longest_edge": most_tokens * unit**2}
    settings = {"size": size, "merge_size": 2, "patch_size": patch, "temporal_patch_size": 2}
    return processor_class(
        image_processor=Qwen2VLImageProcessor(**settings, **colours),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**settings),
        chat_template=_CHAT_TEMPLATE,
    )
