"""Tiny random models of the Qwen-VL family and their prompts: images of any size.

B rows, I images, L columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from tiny_models import BOS, IMAGE_TOKEN, PAD, TEXT, random_model

VISION_START, VISION_END, VIDEO_TOKEN = 101, 102, 103
Part = int | tuple[int, int]
"""Of a row of a prompt: a number of text tokens, or the rows and columns of an image's units."""
ONE: list[tuple[Part, ...]] = [(5, (4, 4), 4)]
SEVERAL: list[tuple[Part, ...]] = [(5, (4, 4), 3, (3, 5), (4, 6), 4)]
BATCH: list[tuple[Part, ...]] = [(5, (4, 4), 4), (9,), (3, (5, 3), 2, (3, 6), 6)]


VISION = {
    "depth": 4,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


def tiny_qwen(**settings: Any) -> Any:
    """Qwen2.5-VL with 4 blocks, of which 1 and 3 attend to whole images, and 3 decoder layers."""
    from transformers import Qwen2_5_VLConfig

    vision = {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 64}
    windows = {"window_size": 56, "fullatt_block_indexes": [1, 3]}
    config = Qwen2_5_VLConfig(**_parts(vision | windows, type="mrope"), **settings)
    return random_model(config)


def tiny_qwen2(**settings: Any) -> Any:
    """Qwen2-VL of the same sizes, without windows."""
    from transformers import Qwen2VLConfig

    vision = {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    config = Qwen2VLConfig(**_parts(vision, type="mrope"), **settings)
    return random_model(config)


def tiny_qwen3(**settings: Any) -> Any:
    """Qwen3-VL of the same sizes; blocks 0 and 2 of the tower reach two decoder layers."""
    from transformers import Qwen3VLConfig

    vision = {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 64}
    deepstack = {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
    parts = _parts(vision | deepstack, mrope_interleaved=True)
    parts["text_config"]["head_dim"] = 12
    return random_model(Qwen3VLConfig(**parts, **settings))


FAMILIES = {"qwen2": tiny_qwen2, "qwen2.5": tiny_qwen, "qwen3": tiny_qwen3}


def _parts(vision: dict[str, Any], **rope: Any) -> dict[str, Any]:
    """Settings of a model around a vision tower."""
    sections = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
    return {
        "text_config": {**TEXT, "rope_parameters": sections | rope},
        "vision_config": VISION | vision,
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "attn_implementation": "sdpa",
    }


def make_batch(
    rows: Sequence[tuple[Part, ...]], side: Literal["left", "right"] = "left", seed: int = 0
) -> dict[str, Any]:
    """What a processor returns."""
    random = torch.Generator().manual_seed(seed)
    prompts, grids = [], []
    for row in rows:
        ids = [BOS]
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(3, 99, (part,), generator=random).tolist()
            else:
                ids += [VISION_START, *[IMAGE_TOKEN] * (part[0] * part[1]), VISION_END]
                grids.append([1, 2 * part[0], 2 * part[1]])
        prompts.append(torch.tensor(ids))
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), PAD)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        own = slice(length - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[i, own], mask[i, own] = prompt, 1
    types = (ids == IMAGE_TOKEN).int()
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    if grids:
        inputs["image_grid_thw"] = torch.tensor(grids)
        num_patches = int(inputs["image_grid_thw"].prod(dim=1).sum())
        inputs["pixel_values"] = torch.randn(num_patches, 3 * 2 * 14 * 14, generator=random)
    return inputs


def single(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a batch, without its padding."""
    real = inputs["attention_mask"][row].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    alone = {name: inputs[name][row : row + 1, real] for name in names if name in inputs}
    starts = (inputs["input_ids"] == VISION_START).sum(dim=1).tolist()
    images = slice(sum(starts[:row]), sum(starts[: row + 1]))
    if starts[row]:
        patches = inputs["image_grid_thw"].prod(dim=1).tolist()
        alone["image_grid_thw"] = inputs["image_grid_thw"][images]
        own = slice(sum(patches[: images.start]), sum(patches[: images.stop]))
        alone["pixel_values"] = inputs["pixel_values"][own]
    return alone
