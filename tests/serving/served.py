"""Models for tests of servers, and what transformers makes of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import IMAGE_TOKEN, TEXT, tiny_processor, tiny_vision
from torch import Tensor

from ocvtp import Pruner
from ocvtp.hosts import find_host

DEMO = Path("checkpoints/demo-vlm")
NETWORK = "checkpoints/demo-pruner/0"
ARCHITECTURE = "OCVTPLlavaForConditionalGeneration"
FOR_ANY = (
    "divprune",
    "fopru",
    "fill_only",
    "visionzip:guidance=received",
    "uniform",
    "pool",
    "fps",
)
FOR_ANY += ("kmeans", "visiondrop", "hiprune:object_block=2", "none", "ridge:weights=none")
FOR_CLIP = ("fastervlm", "visionzip", "vispruner", "holov", "scope", "todre:block=-2")
FOR_CLIP += ("prumerge:block=-2", "prumerge_plus:block=-2", "ridge:block=-2")
FOR_DEMO = (f"ocvtp:checkpoint={NETWORK}", f"ocvtp:checkpoint={NETWORK},early=false,fill=cls")
SPECS = {"clip": FOR_ANY + FOR_CLIP + FOR_DEMO, "siglip": FOR_ANY}


def save_siglip(folder: Path) -> Path:
    """A LLaVA behind SigLIP with heads of 32, which every attention kernel takes."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=tiny_vision("siglip"),
        text_config=LlamaConfig(**TEXT | {"hidden_size": 128}),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = tiny_processor()
    processor.vision_feature_select_strategy = "full"
    processor.num_additional_image_tokens = 0
    processor.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The model in transformers, fp32."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def kept_by_transformers(model: Any, pruner: Pruner, pixel_values: Tensor) -> Tensor:
    """[B, K, D'] what the language model reads of each image, by this project's own host."""
    host = find_host(model)
    handles = host.install(pruner.needs)
    try:
        encoded = host.encode({"pixel_values": pixel_values}, pruner.needs)
    finally:
        for handle in handles:
            handle.remove()
    rows = host.apply(encoded, pruner.select(encoded.tokens)).embeddings
    return rows.unflatten(0, (len(pixel_values), -1))


def overrides(spec: str, num_keep: int) -> dict[str, Any]:
    """What `hf_overrides` is given."""
    settings = {"pruner": spec, "num_keep": num_keep}
    return {"architectures": [ARCHITECTURE], "ocvtp": settings}


def built(spec: str, num_keep: int) -> Pruner:
    """The pruner of a spec."""
    from ocvtp.pruners.specs import build_spec

    return build_spec(spec, num_keep=num_keep)
