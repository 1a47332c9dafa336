"""Models for tests of servers, and what transformers makes of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import IMAGE_TOKEN, TEXT, tiny_processor, tiny_vision
from torch import Tensor

import ocvtp
from ocvtp import Pruner
from ocvtp.hosts.registry import hosts
from ocvtp.random_models.byte_tokenizer import byte_tokenizer
from ocvtp.random_models.weights import materialise

DEMO = Path("checkpoints/demo-vlm")
NETWORK = "checkpoints/demo-pruner/0"
FAMILIES = {
    "clip": "OCVTPLlavaForConditionalGeneration",
    "siglip": "OCVTPLlavaForConditionalGeneration",
    "next": "OCVTPLlavaNextForConditionalGeneration",
    "onevision": "OCVTPLlavaOnevisionForConditionalGeneration",
    "internvl": "OCVTPInternVLForConditionalGeneration",
}
"""Models of the tests, and vLLM's name of the class that serves each."""
PLACEHOLDER = {family: "<image>" for family in FAMILIES} | {"internvl": "<IMG_CONTEXT>"}
FOR_ANY = (
    "divprune",
    "fopru",
    "fill_only",
    "visionzip:guidance=received",
    "uniform",
    "fps",
    "kmeans",
    "visiondrop",
    "hiprune:object_block=2",
    "none",
    "ridge:weights=none",
)
FOR_GRIDS = ("pool",)
FOR_CLS = ("fastervlm", "visionzip", "vispruner", "holov", "scope", "todre:block=-2")
FOR_CLS += ("prumerge:block=-2", "prumerge_plus:block=-2", "ridge:block=-2")
FOR_DEMO = (f"ocvtp:checkpoint={NETWORK}", f"ocvtp:checkpoint={NETWORK},early=false,fill=cls")
SPECS = {
    "clip": FOR_ANY + FOR_GRIDS + FOR_CLS + FOR_DEMO,
    "siglip": FOR_ANY + FOR_GRIDS,
    # of hundreds of tokens, which ranks are odd hangs on the last bits of their attention
    "next": tuple(spec for spec in FOR_ANY + FOR_CLS if spec != "vispruner"),
    "onevision": FOR_ANY,
    "internvl": FOR_ANY + FOR_CLS,
}
_TINY = {"next": "llava-next", "onevision": "llava-onevision", "internvl": "internvl"}


def save(family: str, folder: Path) -> Path:
    """A model of a family, and its processor; its attention has heads of 32, for any kernel."""
    if family == "clip":
        return DEMO
    if family == "siglip":
        return _save_siglip(folder)
    tiny = hosts()[_TINY[family]].tiny
    assert tiny is not None
    small, processor = tiny.make(byte_tokenizer(tiny.special_tokens))
    small.config.vision_config.hidden_act = "gelu"  # which needs no kernel of vLLM's
    text = small.config.text_config
    text.hidden_size, text.head_dim = 128, 32
    model = materialise(small.config)
    model.load_state_dict(small.state_dict() | _of_other_shape(model, small))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _of_other_shape(model: Any, small: Any) -> dict[str, Tensor]:
    before = small.state_dict()
    return {k: v for k, v in model.state_dict().items() if v.shape != before[k].shape}


def _save_siglip(folder: Path) -> Path:
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
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def image(number: int, size: tuple[int, int]) -> Any:
    """A drawing of this width and height: a square and a circle on blots, no two parts alike."""
    from PIL import Image, ImageDraw

    width, height = size
    random = torch.Generator().manual_seed(number)
    cells = (256 * torch.rand(height // 6 + 1, width // 6 + 1, 3, generator=random)).byte()
    drawn = Image.fromarray(cells.numpy()).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(drawn)
    colour = ("red", "blue", "green", "yellow")[number % 4]
    pen.rectangle((width // 10, height // 10, width // 3, height // 3 + number), fill=colour)
    pen.ellipse((width // 2, height // 2, width - 4, height - 4), fill="white")
    return drawn


@torch.inference_mode()
def rows_by_transformers(model: Any, inputs: Any, pruner: Pruner, tiling: dict[str, Any]) -> Tensor:
    """[R', D'] what the language model reads of all images of a prompt, pruned by `attach`."""
    seen: list[Any] = []
    handle = ocvtp.attach(model, pruner, on_prune=seen.append, **tiling)
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    [prompt] = seen
    return prompt.embeddings[0][prompt.short_ids[0] == model.config.image_token_id]


def built(spec: str, num_keep: int, **settings: Any) -> Pruner:
    """The pruner of a spec."""
    from ocvtp.pruners.specs import build_spec

    return build_spec(spec, num_keep=num_keep, **settings)
