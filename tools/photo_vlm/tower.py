"""The vision tower: a DINOv2 of timm's, as transformers' `Dinov2Model`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

FEATURE_LAYER = -2
"""Of `hidden_states`, that the language model reads: after all blocks but the last."""

_NAMES = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Of a block: timm's, and those of published checkpoints."""
_QKV = ("query", "key", "value")


def read_timm(folder: str | Path, size: int) -> Any:
    """A plain DINOv2 of a folder that timm wrote, for square pictures of `size` pixels.

    Raises:
        ValueError: if it is none, or `size` is no multiple of its patch.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; pass a folder of a DINOv2 that timm wrote.")
    settings = {"num_classes": 0, "img_size": size}
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **settings)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"timm cannot make the tower of {folder} ({error}).") from error
    block = model.blocks[0] if hasattr(model, "blocks") else None
    is_plain = getattr(model, "num_prefix_tokens", 0) == 1 and hasattr(model, "cls_token")
    if block is None or not is_plain or not hasattr(getattr(block, "ls1", None), "gamma"):
        raise ValueError(
            f"{folder} is no DINOv2 (a CLS, no registers, layer scale); pass one, e.g. of"
            " vit_small_patch14_dinov2."
        )
    if size % model.patch_embed.patch_size[0]:
        raise ValueError(
            f"size={size} is no multiple of the tower's patch of"
            f" {model.patch_embed.patch_size[0]} pixels; pass one."
        )
    return model.eval()


def convert(model: Any) -> Dinov2Model:
    """The same tower in transformers, whose positions are those of the size that it was read for.

    Args:
        model: of `read_timm`.
    """
    config, weights = tower_config(model), hub_weights(model.state_dict())
    tower: Dinov2Model = Dinov2Model.from_pretrained(None, config=config, state_dict=weights)
    return tower.eval()


def tower_config(model: Any) -> Dinov2Config:
    """The settings in transformers of a tower of timm's."""
    block = model.blocks[0]
    return Dinov2Config(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features // model.embed_dim,
        layer_norm_eps=block.norm1.eps,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
    )


def hub_weights(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that published checkpoints of DINOv2 have in transformers.

    Args:
        given: timm's.
    """
    weights = {
        "embeddings.cls_token": given["cls_token"],
        "embeddings.position_embeddings": given["pos_embed"],
        "embeddings.mask_token": torch.zeros_like(given["cls_token"][0]),  # unused: only training
    }
    for kind in ("weight", "bias"):
        weights[f"embeddings.patch_embeddings.projection.{kind}"] = given[
            f"patch_embed.proj.{kind}"
        ]
        weights[f"layernorm.{kind}"] = given[f"norm.{kind}"]
    for number in {int(name.split(".")[1]) for name in given if name.startswith("blocks.")}:
        old, new = f"blocks.{number}", f"encoder.layer.{number}"
        for place in (1, 2):
            weights[f"{new}.layer_scale{place}.lambda1"] = given[f"{old}.ls{place}.gamma"]
        for kind in ("weight", "bias"):
            for theirs, ours in _NAMES.items():
                weights[f"{new}.{ours}.{kind}"] = given[f"{old}.{theirs}.{kind}"]
            for name, part in zip(_QKV, given[f"{old}.attn.qkv.{kind}"].chunk(3), strict=True):
                weights[f"{new}.attention.attention.{name}.{kind}"] = part
    return {name: value.clone() for name, value in weights.items()}


def processor_statistics(folder: str | Path) -> dict[str, list[float]]:
    """Mean and deviation of the colours that a tower of timm's was trained with."""
    settings = json.loads((Path(folder) / "config.json").read_text()).get("pretrained_cfg", {})
    return {
        "image_mean": list(settings.get("mean", (0.485, 0.456, 0.406))),
        "image_std": list(settings.get("std", (0.229, 0.224, 0.225))),
    }


@torch.no_grad()
def encode(tower: Dinov2Model, pixel_values: Tensor) -> Tensor:
    """[B, 3, S, S] -> [B, N, D], what the language model reads."""
    hidden: Tensor = tower(pixel_values, output_hidden_states=True).hidden_states[FEATURE_LAYER]
    return hidden[:, 1:]
