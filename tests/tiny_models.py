"""Tiny random models: made from configs, without a network, in tens of milliseconds."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp.random_models.clip_config import plain_processor
from ocvtp.random_models.tiny_llava import clip_processor
from ocvtp.random_models.weights import materialise

IMAGE_TOKEN, PAD, BOS, VOCABULARY = 100, 0, 1, 128
TEXT = {  # of the language models
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": 2,
}


def tiny_llava(tower: str, **settings: Any) -> Any:
    """LLaVA-1.5 on 56 pixels: 16 tokens an image, a tower of `tiny_vision`, 3 decoder layers."""
    strategy = "full" if tower == "siglip" else "default"
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": strategy} | settings
    return _llava(tiny_vision(tower), **settings)


def tiny_vision(family: str) -> Any:
    """Settings of a tower of 6 layers on 56 pixels: `clip`, `siglip`, or one of `DINOS`."""
    from transformers import AutoConfig, CLIPVisionConfig, SiglipVisionConfig

    sizes = {"hidden_size": 32, "image_size": 56, "patch_size": 14}
    sizes |= {"num_hidden_layers": 6, "num_attention_heads": 4}
    if family in DINOS:
        v3 = {"intermediate_size": 64, "num_register_tokens": 4}
        own = v3 if family == "dinov3_vit" else {"mlp_ratio": 2}
        return AutoConfig.for_model(family, **sizes, **own)
    if family == "clip":
        return CLIPVisionConfig(**sizes, intermediate_size=64, projection_dim=32)
    return SiglipVisionConfig(**sizes, intermediate_size=64, vision_use_head=False)


DINOS = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def _llava(vision: Any, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlavaConfig

    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=16,
        attn_implementation="sdpa",
        **settings,
    )
    return random_model(config)


def random_model(config: Any) -> Any:
    """A model of random weights in evaluation mode, whose answers run to their full length."""
    model = materialise(config)
    widen(model)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def widen(model: Any) -> None:
    """Make weights larger: of the usual size, they make so small a model nearly blind."""
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.mul_(8.0)
        if name.endswith(("register_tokens", "cls_token", "lambda1")):  # zeros, or all alike
            parameter.normal_(generator=random)


LLAVA_TEMPLATE = (  # LLaVA-1.5's own in transformers
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


def tiny_processor(chat_template: str | None = LLAVA_TEMPLATE) -> Any:
    """The processor of `tiny_llava`: a token for every character."""
    from transformers import LlavaProcessor

    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": 2, "<unk>": 99, "<image>": IMAGE_TOKEN}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special = {"image_token": "<image>"}
    tokenizer = character_tokenizer(vocabulary, **ends, extra_special_tokens=special)
    images, vision = plain_processor(56), tiny_vision("clip")
    return clip_processor(LlavaProcessor, images, tokenizer, vision, chat_template)


def tiny_clip(tower: Any) -> tuple[Any, Any]:
    """A CLIP around a vision tower, with a token for every character, and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = character_tokenizer(
        {"<unk>": 99, "<|startoftext|>": 126, "<|endoftext|>": 127},
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
    )
    text = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 32}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77}
    text |= {"bos_token_id": 126, "eos_token_id": 127, "pad_token_id": 127}
    vision = tower.config.to_dict()
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    widen(model)
    model.vision_model.load_state_dict(tower.state_dict())
    return model.eval(), tokenizer


def character_tokenizer(special: dict[str, int], **settings: Any) -> Any:
    """A tokenizer with a token for every character, and special ones with these numbers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = special | {character: 3 + i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    start, end = settings["bos_token"], settings["eos_token"]
    sequence = f"{start} $A" if IMAGE_TOKEN in special.values() else f"{start} $A {end}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=sequence, special_tokens=[(start, special[start]), (end, special[end])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **settings)
