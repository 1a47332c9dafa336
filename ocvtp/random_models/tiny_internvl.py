"""An InternVL of random weights and its processor: needs no download, answers mean nothing."""

from __future__ import annotations

from typing import Any

import torch

SPECIAL_TOKENS = {
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "turn_bos_token": "<|im_start|>",
    "turn_eos_token": "<|im_end|>",
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIDE, _PATCH = 112, 14
_VISION = {
    "image_size": _SIDE,
    "patch_size": _PATCH,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
_TEXT = {
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def tiny_internvl(tokenizer: Any, seed: int = 0) -> tuple[Any, Any]:
    """An InternVL of 0.7 M weights for images of up to 4 tiles of 16 tokens, and its processor.

    Args:
        tokenizer: one that has `SPECIAL_TOKENS`.
        seed: of the weights.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    turn_end = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS["turn_eos_token"])
    ends = {"eos_token_id": turn_end, "pad_token_id": tokenizer.pad_token_id}
    begin = {"bos_token_id": tokenizer.bos_token_id}
    processor = _processor(tokenizer)
    config = InternVLConfig(
        vision_config=_VISION,
        text_config={**_TEXT, **ends, **begin, "vocab_size": len(tokenizer)},
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
        with torch.no_grad():  # a new tower does not tell places apart
            model.model.vision_tower.embeddings.position_embeddings.normal_(std=0.2)
            model.model.vision_tower.embeddings.cls_token.normal_(std=0.2)
    model.generation_config.eos_token_id = ends["eos_token_id"]
    model.generation_config.pad_token_id = ends["pad_token_id"]
    return model.eval(), processor


def _processor(tokenizer: Any) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": _SIDE, "width": _SIDE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=(_SIDE // (2 * _PATCH)) ** 2,
        chat_template=_CHAT_TEMPLATE,
    )
