"""Vision transformers of timm, frozen and cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from ocvtp.encoders.base import DType, FrozenEncoder
from ocvtp.towers import taps


class TimmEncoder(FrozenEncoder):
    """A frozen ViT of timm (plain blocks with fused qkv), cut after the layer that is read.

    Registers are no tokens. Keys of towers that turn them by positions (DINOv3, EVA) are those
    before rotation.

    Args:
        tower: timm model name, e.g. `vit_base_patch16_clip_224.openai`, or `hf-hub:ID` or
            `local-dir:PATH`.
        layer: number of hidden states that the OC-pruner reads; i is the output of block i - 1.
        pretrained: False for random weights, seeded by `seed`.
        dtype: of weights and computation.
        seed: of random weights.
        model_args: further arguments of `timm.create_model`, e.g. `img_size`.
    """

    def __init__(
        self,
        tower: str,
        layer: int,
        pretrained: bool = True,
        dtype: DType = "float32",
        seed: int = 0,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(dtype)
        self._pretrained = pretrained
        self._seed = seed
        self._name = tower
        self._args = {"num_classes": 0, **(model_args or {})}
        self.tower_id = f"timm:{tower}" if pretrained else f"random:timm:{tower}"
        with torch.device("meta"):  # settings only: no memory, no weights
            model = self._create(pretrained=False)
        self._depth = len(model.blocks)
        self.layer = taps.resolve(layer, self._depth + 1, "hidden_states")
        self.feature_dim = int(model.embed_dim)
        height, width = model.patch_embed.grid_size
        self.grid_hw = (int(height), int(width))
        self.num_prefix = int(model.num_prefix_tokens)
        self._has_cls = getattr(model, "cls_token", None) is not None
        self.patch_size = int(model.patch_embed.patch_size[0])
        self._check_sides(model.patch_embed.img_size, tower)
        size = {"input_size": (3, *model.patch_embed.img_size)}  # `model_args` may have changed it
        self.transform = TimmTransform(resolve_model_data_config(model) | size)

    @property
    def has_cls(self) -> bool:
        return self._has_cls

    @property
    def depth(self) -> int:
        return self._depth

    def _create(self, pretrained: bool) -> Any:
        try:
            model = timm.create_model(self._name, pretrained=pretrained, **self._args)
        except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
            name, reason = self._name, " ".join(str(error).split())[:300]
            close = timm.list_models(f"*{name.split('.')[0]}*")[:5]
            raise ValueError(
                f"timm cannot make {name!r} ({type(error).__name__}: {reason}); similar names:"
                f" {close}. Pass one that timm lists, hf-hub:ID, or local-dir:PATH of a folder that"
                " timm wrote."
            ) from error
        block = next(iter(getattr(model, "blocks", [])), None)
        if not hasattr(getattr(block, "attn", None), "q_norm"):
            raise ValueError(
                f"{self._name!r} is no plain vision transformer (blocks with attn.q_norm); pass a"
                " `vit_*` model of timm."
            )
        return model

    def _build(self, num_blocks: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model = self._create(self._pretrained)
        model.blocks = model.blocks[:num_blocks]
        model.norm = nn.Identity()
        tower: nn.Module = model
        return tower

    def _run(self, tower: nn.Module, pixel_values: Tensor) -> None:
        tower.forward_features(pixel_values)  # type: ignore[operator]

    def _view(self, tower: nn.Module) -> taps.Tower:
        blocks: Any = tower.blocks
        return taps.Tower(
            blocks=blocks,
            num_heads=int(blocks[0].attn.num_heads),
            query_key=lambda block: (block.attn.q_norm, block.attn.k_norm),
            turn=_TURN if getattr(tower, "rope", None) is not None else None,
            has_cls=self.has_cls,
        )


def _turned(attention: Any, heads: Tensor, how: Tensor) -> Tensor:
    """Heads [B, H, T, d] as `attention` turns them, all but those before the patches."""
    first = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    patches = apply_rot_embed_cat(heads[:, :, first:], how, half=half)
    return torch.cat([heads[:, :, :first], patches.to(heads.dtype)], dim=2)


_TURN = taps.Turn(lambda block: block.attn, "rope", _turned)


class TimmTransform:
    """timm's evaluation transform of a model.

    Args:
        settings: `timm.data.resolve_model_data_config(model)`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._image = create_transform(**settings, is_training=False)
        plain = settings | {"interpolation": "nearest", "mean": (0.0,) * 3, "std": (1.0,) * 3}
        self._ids = create_transform(**plain, is_training=False)

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixel values [3, H, W] of an RGB image."""
        return torch.as_tensor(self._image(image))

    def instance_map(self, ids: np.ndarray) -> Tensor:
        """Instance ids [h, w] uint8 through the same geometry: [H, W] int64, 0 outside."""
        image = Image.fromarray(np.repeat(ids[:, :, None], 3, axis=2))
        return torch.as_tensor(self._ids(image))[0].mul(255).round().long()

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """Pixel values [..., 3, H, W] back to colours in 0..1."""
        mean = pixel_values.new_tensor(self.settings["mean"])[:, None, None]
        std = pixel_values.new_tensor(self.settings["std"])[:, None, None]
        return (pixel_values * std + mean).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Settings, for the artifact."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings.items()}
        return {"image_processor_type": "timm", **plain}
