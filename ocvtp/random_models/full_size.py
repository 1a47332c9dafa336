"""Models of real size with random weights: true times, memory and FLOPs without a download.

Their sizes are those of the public checkpoints; only the ids of special tokens differ, because the
tokenizer reads bytes. Their answers mean nothing.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, get_args

from ocvtp.choices import FullSizeModel
from ocvtp.random_models import tiny_llava, tiny_qwen
from ocvtp.random_models.byte_tokenizer import byte_tokenizer
from ocvtp.random_models.clip_config import plain_processor, vision_config
from ocvtp.random_models.weights import materialise as materialise
from ocvtp.shipped import ROOT

DEMO = ROOT / "checkpoints" / "demo-vlm"
_CLIP = "random:clip-vit-large-patch14-336"
_LLAMA = {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def _llama(layers: int, width: int, ffn: int, heads: int) -> dict[str, int | float]:
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn}
    return {**_LLAMA, **shape, "num_attention_heads": heads, "num_key_value_heads": heads}


_VICUNA_7B = _llama(32, 4096, 11008, 32)
_VICUNA_13B = _llama(40, 5120, 13824, 40)
_QWEN_7B_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
_QWEN_7B_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 3584,
    "tokens_per_second": 2,
}
_QWEN_7B_MOST_TOKENS = 16384  # of an image: 12,845,056 pixels
_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

_LLAVA: dict[str, tuple[dict[str, Any], str]] = {
    "llava-1.5-7b": (_VICUNA_7B, "float16"),
    "llava-1.5-13b": (_VICUNA_13B, "float16"),
    "llava-mid": (_llama(4, 2048, 5504, 16), "float32"),
}
FULL_SIZE_MODELS = get_args(FullSizeModel)


def config_of(name: str) -> Any:
    """The configuration of a model, of transformers; builds no weights.

    Args:
        name: one of `FULL_SIZE_MODELS`. `llava-mid` has LLaVA-1.5's whole tower and 4 layers of
            width 2048 after it, for a CPU; `demo` is the VLM in `checkpoints/demo-vlm`.

    Raises:
        ValueError: for another name, or `demo` without its folder.
    """
    from transformers import AutoConfig, LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig

    if name == "demo":
        return AutoConfig.from_pretrained(_demo_folder())
    if name == "qwen2.5-vl-7b":
        ids = tiny_qwen.token_ids(_tokenizer(name))
        text, vision = deepcopy((_QWEN_7B_TEXT, _QWEN_7B_VISION))  # a config keeps what it gets
        text |= ids["text"]
        return Qwen2_5_VLConfig(
            vision_config=vision, text_config=text, dtype="bfloat16", **ids["whole"]
        )
    if name == "llava-next-7b":
        pinpoints = {"image_grid_pinpoints": deepcopy(_NEXT_PINPOINTS)}
        return _llava_config(LlavaNextConfig, _VICUNA_7B, "float16", **pinpoints)
    if name in _LLAVA:
        return _llava_config(LlavaConfig, *_LLAVA[name])
    raise ValueError(f"{name!r} is unknown; models of real size are {list(FULL_SIZE_MODELS)}.")


def build(name: str, dtype: str = "auto", device: str = "cpu", seed: int = 0) -> tuple[Any, Any]:
    """A model of random weights, made in its dtype on its device, and its processor.

    Args:
        name: one of `FULL_SIZE_MODELS`.
        dtype: of the weights; `auto` for the public checkpoint's (float32 for `llava-mid`).
        device: e.g. `cpu`, `cuda`; `meta` takes no memory and holds no numbers.
        seed: of the weights; torch's own random numbers are left as they are.

    Raises:
        ValueError: as `config_of`.
    """
    model = materialise(config_of(name), dtype, device, seed)
    return model, processor(name)


def _llava_config(config_class: Any, text: dict[str, Any], dtype: str, **settings: Any) -> Any:
    from transformers import LlamaConfig

    tokenizer = _tokenizer("llava")
    vision = vision_config(_CLIP)
    return config_class(
        vision_config=vision,
        text_config=LlamaConfig(**text, **_ends(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype=dtype,
        **settings,
    )


def _ends(tokenizer: Any) -> dict[str, int]:
    return {
        key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }


def _tokenizer(name: str) -> Any:
    family = tiny_qwen if name.startswith("qwen") else tiny_llava
    return byte_tokenizer(family.SPECIAL_TOKENS)


def processor(name: str) -> Any:
    """The processor of a model; builds no weights.

    Args:
        name: one of `FULL_SIZE_MODELS`.

    Raises:
        ValueError: as `config_of`.
    """
    from transformers import (
        AutoProcessor,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        LlavaProcessor,
        Qwen2_5_VLProcessor,
    )

    if name == "demo":
        return AutoProcessor.from_pretrained(_demo_folder())
    tokenizer = _tokenizer(name)
    if name == "qwen2.5-vl-7b":
        most = _QWEN_7B_MOST_TOKENS
        return tiny_qwen.processor(Qwen2_5_VLProcessor, tokenizer, patch=14, most_tokens=most)
    vision = config_of(name).vision_config
    if name == "llava-next-7b":
        side = vision.image_size
        images = LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=_NEXT_PINPOINTS,
        )
        return tiny_llava.clip_processor(LlavaNextProcessor, images, tokenizer, vision)
    images = plain_processor(vision.image_size)
    return tiny_llava.clip_processor(LlavaProcessor, images, tokenizer, vision)


def _demo_folder() -> str:
    if not (DEMO / "config.json").is_file():
        raise ValueError(
            f"the demo model is not at {DEMO}: it comes with the repository and with the package;"
            " work in a whole checkout, install ocvtp again, or name another model."
        )
    return str(DEMO)
