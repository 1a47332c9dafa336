"""A family of models from outside the package: all that ocvtp must know of it, in one file.

The model is a LLaVA under another name and with a projector of three layers. `--import` of this
file is all that a command needs.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ocvtp import Needs, Selection, VisualTokens
from ocvtp.hosts import register_host
from ocvtp.hosts.base import Encoded, Kept, Tiny
from ocvtp.hosts.families.clip_tower import ClipFamilyHost
from ocvtp.random_models.clip_config import plain_processor, vision_config
from ocvtp.random_models.tiny_llava import clip_processor
from ocvtp.random_models.weights import materialise


class ToyConfig(LlavaConfig):
    model_type = "toy_vlm"


class ToyProjector(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        inner, outer = config.vision_config.hidden_size, config.text_config.hidden_size
        self.layers = nn.ModuleList(
            nn.Linear(*sizes) for sizes in ((inner, 40), (40, 24), (24, outer))
        )

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = layer(features).tanh()
        return features


class ToyForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = ToyProjector(config)


AutoConfig.register("toy_vlm", ToyConfig)
AutoModelForImageTextToText.register(ToyConfig, ToyForConditionalGeneration)


def tiny_toy(tokenizer: Any) -> tuple[Any, Any]:
    """A toy of random weights and its processor."""
    vision = vision_config("random:tiny")
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        **ends,
    )
    config = ToyConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    images = plain_processor(vision.image_size)
    return materialise(config), clip_processor(LlavaProcessor, images, tokenizer, vision)


@register_host("toy")
class ToyHost(ClipFamilyHost):
    """The adapter."""

    family: ClassVar[str] = "Toy"
    model_types: ClassVar[tuple[str, ...]] = ("toy_vlm",)
    tiny: ClassVar[Tiny | None] = Tiny(tiny_toy, {"image_token": "<image>"})
    counts_operations: ClassVar[bool] = True

    @property
    def image_tokens(self) -> int:
        return math.prod(self.grid_hw)

    def encode(self, images: dict[str, Any], needs: Needs) -> Encoded:
        output, found, later = self._look_inside(images, needs)
        rows = output.pooler_output
        if needs.projected:
            found["projected"] = torch.stack(list(rows))
        embeddings = self._rows(rows, later, found["features"])
        return Encoded(VisualTokens(grid_hw=self.grid_hw, **found), embeddings, output=output)

    def apply(self, encoded: Encoded, selection: Selection) -> Kept:
        keep = selection.keep_indices
        places = keep + encoded.first_rows(keep.device)[:, None]
        return self._kept(encoded, selection, places)
