"""LLaVA-1.5 in vLLM with K visual tokens an image: a CLIP or SigLIP tower, one grid of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from ocvtp.serving.kept_rows import choose
from ocvtp.serving.layouts import LlavaLayout, Shape
from ocvtp.serving.plan import Plan
from ocvtp.serving.tower import look
from ocvtp.serving.vllm_core import PrunedInfo, PrunedModel, PrunedProcessor, whole_heads
from ocvtp.structures import VisualTokens

# transformers >= 5.17 saves a tower without the module around it that vLLM has
AS_SAVED = WeightsMapper(
    orig_to_new_prefix={
        f"{outer}vision_tower.{part}.": f"vision_tower.vision_model.{part}."
        for part in ("embeddings", "encoder", "pre_layrnorm", "post_layernorm", "head")
        for outer in ("", "model.")
    }
)


class PrunedLlavaInfo(PrunedInfo, LlavaProcessingInfo):
    """See `PrunedInfo`."""

    def largest_shape(self) -> Shape:
        return _shape(self.plan)


class PrunedLlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    """See `PrunedProcessor`."""

    def shapes(self, mm_items: Any, processed: Any) -> list[Shape]:
        return [_shape(self.info.plan)] * mm_items.get_all_counts()["image"]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=PrunedLlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class OCVTPLlavaForConditionalGeneration(PrunedModel, LlavaForConditionalGeneration):
    """vLLM's LLaVA whose language model reads K tokens of every image."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | AS_SAVED

    def image_rows(self, asked: list[tuple[int, ...]], **images: Any) -> Sequence[Tensor]:
        given = self._parse_and_validate_image_input(**images)
        found = clip_tokens(self, given["pixel_values"])
        tokens = VisualTokens(grid_hw=self.plan.tower.grid_hw, **found)
        project = self.multi_modal_projector
        rows: dict[int, Tensor] = {}
        for (wanted,) in sorted(set(asked)):
            these = [number for number, own in enumerate(asked) if own == (wanted,)]
            some = tokens if len(these) == len(asked) else _images(tokens, these)
            rows |= zip(these, choose(self.plan, some, wanted, project)[1], strict=True)
        return [rows[number] for number in range(len(asked))]


def clip_tokens(model: Any, pixel_values: Tensor) -> dict[str, Any]:
    """What a plan's pruner reads of the CLIP or SigLIP of a model, as arguments of `VisualTokens`.

    Args:
        model: a `PrunedModel`. pixel_values: [B, 3, H, W].
    """
    plan: Plan = model.plan
    attention = model.vision_tower.vision_model.encoder.layers[0].self_attn
    heads = whole_heads(attention.tp_size > 1)
    return look(model.vision_tower, pixel_values, plan.pruner.needs, plan.tower, heads)


def _shape(plan: Plan) -> Shape:
    assert isinstance(plan.layout, LlavaLayout)
    return plan.layout.shape()


def _images(tokens: VisualTokens, numbers: list[int]) -> VisualTokens:
    index = torch.tensor(numbers).to(tokens.features.device, non_blocking=True)
    return tokens.map(lambda values: values.index_select(0, index))
