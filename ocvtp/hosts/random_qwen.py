"""A Qwen2.5-VL of random weights and its processor: needs no download, answers mean nothing."""

from __future__ import annotations

from typing import Any

import torch

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
_SIZES = {"patch_size": 14, "temporal_patch_size": 2}
_VISION = {
    **_SIZES,
    "spatial_merge_size": 2,
    "window_size": 112,
    "depth": 6,
    "fullatt_block_indexes": [2, 5],
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_heads": 4,
    "out_hidden_size": 96,
    "initializer_range": 0.2,
}
_TEXT = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 1e4},
    "initializer_range": 0.2,
}


def tiny_qwen(tokenizer: Any, seed: int = 0) -> tuple[Any, Any]:
    """A Qwen2.5-VL of 0.7 M weights for images of up to 144 visual tokens, and its processor.

    Args:
        tokenizer: that has `SPECIAL_TOKENS`.
        seed: of the weights.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {name: tokenizer.convert_tokens_to_ids(t) for name, t in SPECIAL_TOKENS.items()}
    ends = {"eos_token_id": ids["turn_eos_token"], "pad_token_id": tokenizer.pad_token_id}
    begin = {"bos_token_id": tokenizer.bos_token_id}
    config = Qwen2_5_VLConfig(
        vision_config=_VISION,
        text_config={**_TEXT, **ends, **begin, "vocab_size": len(tokenizer)},
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ends["eos_token_id"]
    model.generation_config.pad_token_id = ends["pad_token_id"]
    return model.eval(), qwen_processor(tokenizer, most_tokens=144)


def qwen_processor(tokenizer: Any, most_tokens: int) -> Any:
    """Qwen2.5-VL's own processor around a tokenizer, for images of up to so many visual tokens."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    unit = 2 * _SIZES["patch_size"]
    size = {"shortest_edge": 4 * unit**2, "longest_edge": most_tokens * unit**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, merge_size=2, **_SIZES),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, merge_size=2, **_SIZES),
        chat_template=_CHAT_TEMPLATE,
    )
