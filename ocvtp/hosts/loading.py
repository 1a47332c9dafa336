"""Models and processors by name: a folder, a hub id, or random weights that need no download."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from ocvtp.encoders.clip import plain_processor, random_tower, vision_config
from ocvtp.hosts.random_qwen import SPECIAL_TOKENS, tiny_qwen

RANDOM_MODELS = ("random:tiny-llava", "random:tiny-llava-next", "random:tiny-qwen2.5-vl")
RANDOM_CLIPS = ("random:tiny",)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def load_model(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """A vision-language model in evaluation mode, and its processor.

    Args:
        name: folder or hub id, or one of `RANDOM_MODELS` (random weights, meaningless answers).
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        device: e.g. `cpu`, `cuda`.

    Raises:
        ValueError: if there is no such model.
    """
    if name.startswith("random:"):
        model, processor = _random_model(name)
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model={name!r} cannot be loaded ({' '.join(str(error).split())[:300]}); pass a"
                f" folder or hub id of a vision-language model, or one of {list(RANDOM_MODELS)}."
            ) from error
    if dtype != "auto":
        model = model.to(getattr(torch, dtype))
    return model.to(device).eval(), processor


def open_image(path: str) -> Image.Image:
    """An image file in RGB.

    Raises:
        ValueError: if it is missing or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"image {path!r} cannot be read ({error}); pass a JPEG or PNG.") from error


def _random_model(name: str) -> tuple[Any, Any]:
    if name not in RANDOM_MODELS:
        raise ValueError(f"{name!r} is unknown; random models are {list(RANDOM_MODELS)}.")
    if name == "random:tiny-qwen2.5-vl":
        return tiny_qwen(_byte_tokenizer(SPECIAL_TOKENS))
    return tiny_llava_next() if name.endswith("next") else tiny_llava()


def tiny_llava(seed: int = 0) -> tuple[Any, Any]:
    """A LLaVA-1.5 of 0.5 M random weights behind the tower `random:tiny`, and its processor."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer, vision = _byte_tokenizer(), vision_config("random:tiny")
    side = vision.image_size // vision.patch_size
    settings = {"image_seq_length": side * side}
    model = _around_tower(LlavaForConditionalGeneration, LlavaConfig, tokenizer, seed, settings)
    return model, _processor(LlavaProcessor, plain_processor(vision.image_size), tokenizer, vision)


def tiny_llava_next(seed: int = 0) -> tuple[Any, Any]:
    """The same as a LLaVA-NeXT: a base view and up to four tiles."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer, vision = _byte_tokenizer(), vision_config("random:tiny")
    side = vision.image_size
    tiles = [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]]
    grid = {"image_grid_pinpoints": [[rows * side, columns * side] for rows, columns in tiles]}
    images = LlavaNextImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **grid
    )
    model = _around_tower(LlavaNextForConditionalGeneration, LlavaNextConfig, tokenizer, seed, grid)
    return model, _processor(LlavaNextProcessor, images, tokenizer, vision)


def _around_tower(
    model_class: Any, config_class: Any, tokenizer: Any, seed: int, settings: dict[str, Any]
) -> Any:
    """A model of random weights behind the tower `random:tiny`."""
    from transformers import LlamaConfig

    vision = vision_config("random:tiny")
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
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.model.vision_tower.load_state_dict(random_tower(vision, seed).state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def random_clip(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A whole CLIP of random weights around the tower `random:tiny`, and its tokenizer.

    Its texts mean nothing: it lets pruners that read them run on `random:tiny-llava`.

    Raises:
        ValueError: for other names.
    """
    from transformers import CLIPConfig, CLIPModel

    if name not in RANDOM_CLIPS:
        raise ValueError(f"text_tower={name!r} is unknown; random ones are {list(RANDOM_CLIPS)}.")
    tokenizer = _byte_tokenizer()
    vision = vision_config(name)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "initializer_factor": 2.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config=text, vision_config=vision.to_dict(), projection_dim=vision.projection_dim
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    model.vision_model.load_state_dict(random_tower(vision, seed).state_dict())
    return model.eval(), tokenizer


def _processor(processor_class: Any, images: Any, tokenizer: Any, vision: Any) -> Any:
    """A family's own processor around a tokenizer, for a tower of these settings."""
    return processor_class(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )


def _byte_tokenizer(more: dict[str, str] | None = None) -> Any:
    """A tokenizer that reads any text, byte by byte, with more special tokens by their names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    extra = {"image_token": "<image>"} if more is None else more
    special = ["<pad>", "<s>", "</s>", "<unk>", *extra.values()]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=extra,
        padding_side="left",
    )
