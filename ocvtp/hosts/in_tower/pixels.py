"""The patches of an image as its pixels were.

U views of a call (images, or tiles of images), P pixels on the side of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from ocvtp.transformers_names import DINO_TOWERS


@dataclass(frozen=True)
class PixelScale:
    """How an image processor made what the tower reads: (rescale_factor x - mean) / std.

    Args:
        mean: of the three colours.
        std: of them.
        rescale_factor: of values from 0 to 255.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255

    def undo(self, pixel_values: Tensor) -> Tensor:
        """[U, 3, H, W] as whole numbers from 0 to 255, fp32."""
        pixels = pixel_values.float()
        mean, std = (pixels.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return ((pixels * std + mean) / self.rescale_factor).round().clamp(0, 255)


def scale_of(processor: Any, model_type: str) -> PixelScale:
    """What the processor does; without one, what processors of the tower's family do.

    Args:
        processor: of the model, or its image processor, or None.
        model_type: of the tower.

    Raises:
        ValueError: if neither is known.
    """
    from transformers.image_utils import (
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
        IMAGENET_STANDARD_MEAN,
        IMAGENET_STANDARD_STD,
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
    )

    images = getattr(processor, "image_processor", processor)
    if getattr(images, "image_mean", None) is None:
        dino = PixelScale(tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD))
        known = {
            **dict.fromkeys(DINO_TOWERS, dino),
            "clip_vision_model": PixelScale(tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)),
            "siglip_vision_model": PixelScale(
                tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD)
            ),
        }
        if model_type not in known:
            raise ValueError(
                f"the pruner reads pixels, and how those of a {model_type} were normalised is not"
                " known; pass processor=, the one that makes the model's inputs."
            )
        return known[model_type]
    normalises = getattr(images, "do_normalize", True)
    return PixelScale(
        tuple(images.image_mean) if normalises else (0.0, 0.0, 0.0),
        tuple(images.image_std) if normalises else (1.0, 1.0, 1.0),
        float(images.rescale_factor) if getattr(images, "do_rescale", True) else 1.0,
    )


def patches(pixels: Tensor, side: int) -> Tensor:
    """[U, 3, H, W] -> [U, N, 3 P P] in raster order, colour after colour."""
    return functional.unfold(pixels, side, stride=side).transpose(1, 2)
