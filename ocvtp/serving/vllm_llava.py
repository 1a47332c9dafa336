"""LLaVA-1.5 in vLLM with K visual tokens an image. T are the tokens of the tower, its CLS included.

Nothing here is imported before vLLM builds the architecture that `vllm_plugin` registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import InputProcessingContext

from ocvtp.ops.merging import merge
from ocvtp.serving.plan import Plan, read_plan
from ocvtp.serving.tower import see
from ocvtp.structures import Selection, take

# transformers >= 5.17 saves a tower without the module around it that vLLM has
_RENAMED = {
    f"vision_tower.{part}.": f"vision_tower.vision_model.{part}."
    for part in ("embeddings", "encoder", "pre_layrnorm", "post_layernorm", "head")
}


class PrunedProcessingInfo(LlavaProcessingInfo):
    """Tells vLLM how many places in a prompt an image takes: K, whatever its size."""

    @cached_property
    def plan(self) -> Plan:
        """What the model's configuration asks for."""
        return read_plan(self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        del image_width, image_height
        return self.plan.num_keep


def _info(context: InputProcessingContext) -> PrunedProcessingInfo:
    """Refuse in the first process what the others could not do.

    Raises:
        ValueError: see `read_plan`; and for embeddings in place of images.
    """
    info = PrunedProcessingInfo(context)
    assert info.plan.num_keep >= 1
    if context.get_mm_config().enable_mm_embeds:
        raise ValueError(
            "enable_mm_embeds lets callers pass image embeddings, which no pruner sees; leave it"
            " out, and pass images."
        )
    return info


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=_info, dummy_inputs=LlavaDummyInputsBuilder
)
class OCVTPLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """vLLM's LLaVA whose language model reads K tokens of every image.

    Raises:
        ValueError: for models and pruners that cannot be served, see `read_plan`.
    """

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix=_RENAMED
    )
    # the tower reads N tokens where vLLM would count K
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        with _as_saved():
            self.plan = read_plan(vllm_config.model_config.hf_config)

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Any) -> Tensor:
        """[B, 3, H, W] -> [B, K, D], what goes to the projector."""
        plan = self.plan
        needs = plan.pruner.needs
        heads = self._whole_heads(vision_tower)
        tokens = see(vision_tower, pixel_values, needs, plan.tower, heads)
        if needs.projected:
            projected = self.multi_modal_projector(tokens.features)
            tokens = replace(tokens, projected=projected)
        selection = plan.pruner.select(tokens)
        _check_number(plan, selection)
        if selection.merge is None:
            return take(tokens.features, selection.keep_indices)
        return merge(tokens, selection.merge)

    @staticmethod
    def _whole_heads(vision_tower: Any) -> Any:
        """What puts the heads of all ranks side by side, where they are spread."""
        if vision_tower.vision_model.encoder.layers[0].self_attn.tp_size == 1:
            return torch.Tensor.contiguous
        return _all_heads


def _all_heads(states: Tensor) -> Tensor:
    """[B, T, D / R] of every rank -> [B, T, D]; ranks hold consecutive heads."""
    heads: Tensor = tensor_model_parallel_all_gather(states.contiguous())
    return heads


def _check_number(plan: Plan, selection: Selection) -> None:
    """A wrong number of tokens would fill the places of another image.

    Raises:
        RuntimeError: if it is not K of every image.
    """
    kept = selection.keep_indices.shape[1]
    if kept != plan.num_keep or selection.valid is not None:
        ragged = "" if selection.valid is None else ", some of which do not count"
        raise RuntimeError(
            f"pruner {plan.pruner.name!r} kept {kept} tokens{ragged}, but {plan.num_keep} places of"
            " every image are reserved."
        )


@contextmanager
def _as_saved() -> Iterator[None]:
    """Load a pruner's network as it was saved: vLLM builds models in the type of its weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
