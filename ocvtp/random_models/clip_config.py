"""Vision towers by name: their settings, and random weights for them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ocvtp.shipped import find_weights
from ocvtp.transformers_names import VISION_TOWERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TINY = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 8}
_TINY_DINOV2 = {"mlp_ratio": 3, "image_size": 96, "initializer_range": 0.2, **_TINY}

SECOND_TO_LAST = -2
"""The layer of `hidden_states` that LLaVA reads, and that a tower alone is judged by."""

RANDOM_TOWERS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 96,
        "patch_size": 8,
        "projection_dim": 64,
        "initializer_factor": 2.0,
    },
    "tiny-dinov2": {"model_type": "dinov2", **_TINY_DINOV2},
    "tiny-dinov2-with-registers": {"model_type": "dinov2_with_registers", **_TINY_DINOV2},
    "tiny-dinov3": {
        "model_type": "dinov3_vit",
        "intermediate_size": 192,
        "image_size": 96,
        "num_register_tokens": 4,
        "initializer_range": 0.2,
        **_TINY,
    },
    "tiny-siglip2": {
        "model_type": "siglip2_vision_model",
        "intermediate_size": 192,
        "num_patches": 144,
        "vision_use_head": False,
        **_TINY,
    },
    "clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
"""Towers with random weights, named `random:NAME`: for tests, demonstrations and timing."""


def vision_config(tower: str | dict[str, Any]) -> PreTrainedConfig:
    """Settings of a tower: of `random:NAME`, of a settings dictionary, a folder or a hub id.

    Raises:
        ValueError: if it is unknown, or no tower of CLIP, SigLIP or DINO.
    """
    from transformers import AutoConfig

    if isinstance(tower, str) and tower.startswith("random:"):
        name = tower.removeprefix("random:")
        if name not in RANDOM_TOWERS:
            raise ValueError(f"{tower!r} is unknown; random towers are {sorted(RANDOM_TOWERS)}.")
        tower = RANDOM_TOWERS[name]
    if isinstance(tower, dict):
        settings = dict(tower)
        kind = settings.pop("model_type", "clip_vision_model")
        config = AutoConfig.for_model(kind, **settings)
    else:
        config = _saved_config(tower)
        config = getattr(config, "vision_config", config)
    if config.model_type not in VISION_TOWERS:
        raise ValueError(
            f"tower={tower!r} is a {config.model_type}; pass one of {', '.join(VISION_TOWERS)}, or"
            " use ocvtp.encoders.TimmEncoder."
        )
    return config


def _saved_config(tower: str) -> PreTrainedConfig:
    """Of a folder or hub id: of the tower, or of what holds it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(find_weights(tower))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tower={tower!r} is neither a folder with a config.json nor a hub id that can be"
            f" reached now nor one of {['random:' + n for n in sorted(RANDOM_TOWERS)]}."
        ) from error


def selected_layer(tower: str) -> int:
    """The layer of `hidden_states` that the language model reads, where a tower's name is a VLM's.

    Args:
        tower: see `vision_config`.

    Returns:
        that of the VLM's configuration; `SECOND_TO_LAST` of a tower that is no VLM's.

    Raises:
        ValueError: if the VLM reads several.
    """
    if tower.startswith("random:"):
        return SECOND_TO_LAST
    layer = getattr(_saved_config(tower), "vision_feature_layer", SECOND_TO_LAST)
    if not isinstance(layer, int):
        raise ValueError(f"{tower!r} reads several layers of its tower, {layer}; pass one of them.")
    return layer


def random_tower(config: PreTrainedConfig, seed: int) -> nn.Module:
    """A tower with random weights: the same for the same settings and seed."""
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower: nn.Module = AutoModel.from_config(config, attn_implementation="sdpa")
    return tower


def plain_processor(size: int) -> Any:
    """CLIP's image processor for square images of `size` pixels."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def square_processor(processor: Any, size: int) -> Any:
    """An image processor that makes patches of images of any shape, for squares of `size` pixels.

    Args:
        processor: of transformers; returned as it is unless it makes patches.
        size: in pixels.
    """
    from transformers import SiglipImageProcessor

    if not hasattr(processor, "max_num_patches"):
        return processor
    names = ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb"]
    names += ["image_mean", "image_std", "rescale_factor", "resample"]
    settings = {n: v for n in names if (v := getattr(processor, n, None)) is not None}
    return SiglipImageProcessor(size={"height": size, "width": size}, **settings)


def resized(processor: Any, size: int, known: tuple[int, int]) -> Any:
    """A copy of an image processor for pictures of another size, that shows as much of an image.

    Args:
        processor: of transformers. size: of the sides, in pixels.
        known: height and width of the pictures that it makes.
    """
    made, share = copy.deepcopy(processor), size / min(known)
    for name in ("size", "crop_size"):
        if sides := getattr(made, name, None):
            scaled = {side: round(share * pixels) for side, pixels in dict(sides).items() if pixels}
            setattr(made, name, type(sides)(**scaled))
    return made
