"""Inputs of the photo VLM at a size that trains in seconds: all of them drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from ocvtp.data.scenes import write_scenes
from tools.photo_vlm.cutouts import CutoutRule
from tools.photo_vlm.settings import PhotoSettings, PhotoStage, ReaderSettings

SIZE, PATCH = 84, 14
RULE = CutoutRule(least_side=16, least_area=100, least_train=2, least_test=2, most=8)
_TOWER = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 56, "num_classes": 0}


def write_inputs(root: Path) -> dict[str, str]:
    """Folders in the layouts of COCO, of photographs and of timm."""
    write_scenes(root / "coco", 12, 8, 192, seed=0)
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(256, size=(4, 6, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((120, 96))
        image.save(root / f"photos/{number:04d}.png")
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", **_TOWER)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # else a block adds next to nothing
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    sizes = {"input_size": [3, 56, 56], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    how = {"model_args": _TOWER, "safe_serialization": True}
    save_for_hf(model, root / "tower", model_config=sizes, **how)
    return {name: str(root / name) for name in ("coco", "photos", "tower")}


def tiny_settings(inputs: dict[str, str], output: Path, **changes: object) -> PhotoSettings:
    """Two stages of a few steps."""
    stages = [
        PhotoStage("words", 3, batch_size=4, align=1.0, warmup=1),
        PhotoStage(
            "english",
            3,
            batch_size=4,
            align=0.3,
            answer=1.0,
            questions=4,
            prompts="english",
            drop=0.5,
            spotlight=20,
            fresh_attention=True,
            warmup=1,
        ),
    ]
    settings = PhotoSettings(
        **inputs,
        output=str(output),
        num_train=6,
        num_test=4,
        questions=3,
        size=SIZE,
        rule=RULE,
        reader=ReaderSettings(text_dim=32, text_layers=2, num_heads=4),
        stages=stages,
        checkpoint_every=2,
    )
    return replace(settings, **changes)
