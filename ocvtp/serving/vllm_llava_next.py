"""LLaVA-NeXT and LLaVA-OneVision in vLLM with K visual tokens an image, or a tile.

T tiles of all images of a call, base views included.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from ocvtp.serving.kept_rows import TiledImage, tiled_rows
from ocvtp.serving.layouts import Shape, TiledLayout
from ocvtp.serving.plan import Plan
from ocvtp.serving.vllm_core import PrunedInfo, PrunedModel, PrunedProcessor
from ocvtp.serving.vllm_llava import AS_SAVED, clip_tokens
from ocvtp.transformers_names import pack_tiles


class PrunedTiledInfo(PrunedInfo):
    """See `PrunedInfo`; of models that cut images into tiles."""

    def largest_shape(self) -> Shape:
        return layout_of(self.plan).shape(layout_of(self.plan).largest(self.plan.pruner))

    def get_image_size_with_most_features(self) -> ImageSize:
        """Of those that the pruner can choose from."""
        height, width = layout_of(self.plan).largest(self.plan.pruner)
        return ImageSize(width=width, height=height)


class PrunedTiledProcessor(PrunedProcessor):
    """See `PrunedProcessor`."""

    def shapes(self, mm_items: Any, processed: Any) -> list[Shape]:
        layout = layout_of(self.info.plan)
        return [layout.shape((height, width)) for height, width in sizes_of(processed)]


class PrunedNextInfo(PrunedTiledInfo, LlavaNextProcessingInfo):
    """See `PrunedInfo`."""


class PrunedNextProcessor(PrunedTiledProcessor, LlavaNextMultiModalProcessor):
    """See `PrunedProcessor`."""


class PrunedOnevisionInfo(PrunedTiledInfo, LlavaOnevisionProcessingInfo):
    """See `PrunedInfo`."""


class PrunedOnevisionProcessor(PrunedTiledProcessor, LlavaOnevisionMultiModalProcessor):
    """See `PrunedProcessor`."""


class PrunedTiledModel(PrunedModel):
    """See `PrunedModel`; the images that the model resizes are pruned as the rows that it reads."""

    config: Any
    vision_tower: Any
    multi_modal_projector: Any
    image_newline: Tensor

    def image_rows(self, asked: list[tuple[int, ...]], **images: Any) -> Sequence[Tensor]:
        given = self._parse_and_validate_image_input(**images)  # type: ignore[attr-defined]
        sizes = sizes_of(given)
        maps = [layout_of(self.plan).token_map(size) for size in sizes]
        counts = [sum(one.num_tiles) for one in maps]
        # images of few tiles come with padding
        tiles = [own[:count] for own, count in zip(given["pixel_values"], counts, strict=True)]
        found = clip_tokens(self, torch.cat(tiles))
        firsts = [0, *accumulate(counts)]
        own = [TiledImage(*image) for image in zip(maps, asked, firsts, strict=False)]
        plain = [image for image in own if not image.token_map.mixed]
        project, newline = self.multi_modal_projector, self.image_newline
        rows = iter(tiled_rows(self.plan, found, plain, project, newline))
        return [
            self._resized(found["features"], image, size) if image.token_map.mixed else next(rows)
            for image, size in zip(own, sizes, strict=True)
        ]

    def _resized(self, features: Tensor, image: TiledImage, size: tuple[int, int]) -> Tensor:
        """The rows of an image whose tokens [T, N, D] the model resizes."""
        token_map, newline = image.token_map, self.image_newline
        tiles = features[image.first : image.first + sum(token_map.num_tiles)]
        projected = self.multi_modal_projector(tiles)
        [read] = pack_tiles(self.config, [list(size)], [projected], newline)
        index = (token_map.source >= 0).nonzero()[:, 0].to(read.device, non_blocking=True)
        found = {"features": read[index][None]}
        whole = TiledImage(token_map.by_rows(), image.asked, 0)
        return tiled_rows(self.plan, found, [whole], _as_is, newline)[0]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedNextProcessor, info=PrunedNextInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class OCVTPLlavaNextForConditionalGeneration(PrunedTiledModel, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT whose language model reads K tokens of every image, or tile."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | AS_SAVED


@MULTIMODAL_REGISTRY.register_processor(
    PrunedOnevisionProcessor, info=PrunedOnevisionInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class OCVTPLlavaOnevisionForConditionalGeneration(
    PrunedTiledModel, LlavaOnevisionForConditionalGeneration
):
    """vLLM's LLaVA-OneVision whose language model reads K tokens of every image, or tile."""

    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | AS_SAVED


def layout_of(plan: Plan) -> TiledLayout:
    """Of a plan for images in tiles."""
    assert isinstance(plan.layout, TiledLayout)
    return plan.layout


def sizes_of(images: Any) -> list[tuple[int, int]]:
    """Heights and widths of images in pixels."""
    return [(int(height), int(width)) for height, width in images["image_sizes"]]


def _as_is(rows: Tensor) -> Tensor:
    return rows
