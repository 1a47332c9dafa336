"""A tiny vision transformer as timm writes it into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

SIZES = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 56, "num_classes": 0}


def tiny_timm(
    folder: Path, architecture: str = "vit_small_patch14_dinov2", **sizes: Any
) -> dict[str, Any]:
    """Write one with random weights, `SIZES` where nothing else is said; those it has."""
    sizes = SIZES | sizes
    torch.manual_seed(0)
    model = timm.create_model(architecture, **sizes)
    side = sizes["img_size"]
    save_for_hf(model, folder, model_config={"input_size": [3, side, side]}, model_args=sizes)
    return sizes
