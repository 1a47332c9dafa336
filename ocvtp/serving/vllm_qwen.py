"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM with K visual tokens an image.

I images of a call, R visual tokens of all of them; L tokens of a prompt.

Rows of images bring with them where in the image they are (`coordinates.py`). vLLM's runners embed
a part of a prompt and then run the model on it; between the two the model keeps what it needs, as
vLLM's Qwen3-VL does with its DeepStack rows. The road that vLLM has for pruned videos is not taken:
its runner for CPUs does not go there, text after an image would depend on what was kept of it, and
it works on whole prompts, request by request, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.utils import _merge_multimodal_embeddings
from vllm.multimodal import MULTIMODAL_REGISTRY

from ocvtp.ops.merging import merge
from ocvtp.serving.coordinates import (
    Place,
    apart,
    prompt_coordinates,
    with_columns,
)
from ocvtp.serving.kept_rows import choose
from ocvtp.serving.layouts import QwenLayout, Shape
from ocvtp.serving.packed_tower import batches, look
from ocvtp.serving.plan import Plan
from ocvtp.serving.vllm_core import PrunedInfo, PrunedModel, PrunedProcessor, whole_heads
from ocvtp.structures import Selection, VisualTokens, take

_ANY_RATE = 1e-6


class PrunedPackedInfo(PrunedInfo):
    """See `PrunedInfo`; of models whose images have any shape."""

    def largest_shape(self) -> Shape:
        info: Any = self
        return Shape((info.get_max_image_tokens(),))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images alone; videos are named, as vLLM sorts settings of processors by these names."""
        return {**super().get_supported_mm_limits(), "video": 0}

    def get_num_frames_with_most_features(self, seq_len: int, mm_counts: Any, *more: Any) -> int:
        """One: videos are not served."""
        return 1


class PrunedPackedProcessor(PrunedProcessor):
    """See `PrunedProcessor`."""

    def shapes(self, mm_items: Any, processed: Any) -> list[Shape]:
        layout = layout_of(self.info.plan)
        return [layout.shape(grid) for grid in processed["image_grid_thw"].tolist()]


class PrunedPackedModel(PrunedModel):
    """See `PrunedModel`; kept tokens keep the coordinates of their places, text keeps its own.

    Raises:
        ValueError: also for engines in which not all that reads a prompt would know coordinates.
    """

    supports_multimodal_pruning: ClassVar[bool] = False  # in vLLM's sense, see above
    config: Any
    visual: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        _check_engine(vllm_config)
        with _long_prompts(vllm_config.model_config.multimodal_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        scheduler = vllm_config.scheduler_config
        self._most_tokens = int(scheduler.max_num_encoder_input_tokens)
        # At fixed addresses, as graphs want them, and never side by side, as compilers do.
        columns = int(scheduler.max_num_batched_tokens) + 1
        self._steps = torch.zeros(3, columns, dtype=torch.long)
        self._read = torch.zeros_like(self._steps)

    def get_encoder_cudagraph_config(self) -> Any:
        """None: graphs of the tower would leave the pruner out."""
        parent: Any = super()
        return replace(parent.get_encoder_cudagraph_config(), modalities=[])

    def image_rows(self, asked: list[tuple[int, ...]], **images: Any) -> Sequence[Tensor]:
        grids, pixels = images["image_grid_thw"].tolist(), images["pixel_values"]
        patches = [frames * rows * columns for frames, rows, columns in grids]
        unit = layout_of(self.plan).unit_side ** 2
        rows: list[Tensor] = []
        parts = iter(pixels.split(patches))
        for some in batches([count // unit for count in patches], self._most_tokens):
            own = torch.cat([next(parts) for _ in some])
            rows += self._rows(own, [grids[n] for n in some], [asked[n][0] for n in some])
        return rows

    def _rows(self, pixels: Tensor, grids_thw: list[list[int]], asked: list[int]) -> list[Tensor]:
        """[K, ...] of each image, with where its tokens are."""
        layout, needs = layout_of(self.plan), self.plan.pruner.needs
        heads = whole_heads(self.visual.blocks[0].attn.tp_size > 1)
        wide, found = look(self.visual, pixels, grids_thw, needs, layout, heads)
        grids = [layout.grid(grid) for grid in grids_thw]
        images = wide.split([rows * columns for rows, columns in grids])
        groups: dict[tuple[tuple[int, int], int], list[int]] = {}
        for number, (grid, wanted) in enumerate(zip(grids, asked, strict=True)):
            groups.setdefault((grid, wanted), []).append(number)
        kept: dict[int, Tensor] = {}
        for (grid, wanted), numbers in groups.items():
            whole = torch.stack([images[number] for number in numbers])  # [V, N, D' (1 + E)]
            own = {name: _of_images(values, numbers, grid) for name, values in found.items()}
            kept |= zip(numbers, self._kept(whole, own, grid, wanted), strict=True)
        return [kept[number] for number in range(len(grids))]

    def _kept(
        self, whole: Tensor, found: dict[str, Any], grid: tuple[int, int], wanted: int
    ) -> Tensor:
        """[V, K, ...] of V images of one shape, from the rows [V, N, ...] of all their tokens."""
        width = int(self.config.get_text_config().hidden_size)
        features = whole[:, :, :width]
        projected = features if self.plan.pruner.needs.projected else None
        heads = int(self.visual.num_heads)
        tokens = VisualTokens(features, grid, projected=projected, num_heads=heads, **found)
        selection, rows = choose(self.plan, tokens, wanted, _as_is, in_places=True)
        further = _like(selection, tokens, whole[:, :, width:])
        return with_columns(torch.cat([rows, further], dim=2), selection.keep_indices, grid)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """See vLLM's `SupportsMRoPE`; those of images' tokens are at their origins."""
        places = []
        for image in mm_features:
            grid = layout_of(self.plan).grid(image.data["image_grid_thw"].data.tolist())
            places.append(Place(image.mm_position.offset, image.mm_position.length, grid))
        return prompt_coordinates(len(input_tokens), places)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> Tensor:
        """See vLLM's `SupportsMultiModal`; keeps where the rows are until `forward`."""
        self._steps.zero_()
        rows = multimodal_embeddings
        if rows:
            own, steps = apart(torch.cat([*rows]))
            rows, places = [own], self._steps[:, : len(input_ids)].T
            _merge_multimodal_embeddings(places, [steps], is_multimodal)
        parent: Any = super()
        embedded: Tensor = parent.embed_input_ids(input_ids, rows, is_multimodal=is_multimodal)
        return embedded

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """See vLLM's model."""
        count = positions.shape[1]
        read = self._read[:, :count]
        torch.add(positions, self._steps[:, :count], out=read)
        parent: Any = super()
        return parent.forward(input_ids, read, *args, **kwargs)


class PrunedQwen2Info(PrunedPackedInfo, Qwen2VLProcessingInfo):
    """See `PrunedInfo`."""


class PrunedQwen2Processor(PrunedPackedProcessor, Qwen2VLMultiModalProcessor):
    """See `PrunedProcessor`."""


class PrunedQwen25Info(PrunedPackedInfo, Qwen2_5_VLProcessingInfo):
    """See `PrunedInfo`."""


class PrunedQwen25Processor(PrunedPackedProcessor, Qwen2_5_VLMultiModalProcessor):
    """See `PrunedProcessor`."""


class PrunedQwen3Info(PrunedPackedInfo, Qwen3VLProcessingInfo):
    """See `PrunedInfo`."""


class PrunedQwen3Processor(PrunedPackedProcessor, Qwen3VLMultiModalProcessor):
    """See `PrunedProcessor`."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2Processor, info=PrunedQwen2Info, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class OCVTPQwen2VLForConditionalGeneration(PrunedPackedModel, Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL whose language model reads K tokens of every image."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen25Processor, info=PrunedQwen25Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class OCVTPQwen2_5_VLForConditionalGeneration(
    PrunedPackedModel, Qwen2_5_VLForConditionalGeneration
):
    """vLLM's Qwen2.5-VL whose language model reads K tokens of every image."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3Processor, info=PrunedQwen3Info, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class OCVTPQwen3VLForConditionalGeneration(PrunedPackedModel, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL whose language model reads K tokens of every image, and their DeepStack."""


def _check_engine(vllm_config: Any) -> None:
    """Refuse engines in which others than this model read positions, or parts of them.

    Raises:
        ValueError: that says what to leave out.
    """
    refused = {"speculative_config": vllm_config.speculative_config is not None}
    refused["pipeline_parallel_size"] = vllm_config.parallel_config.pipeline_parallel_size > 1
    refused["enable_dbo or ubatch_size"] = vllm_config.parallel_config.use_ubatching
    for name, is_set in refused.items():
        if is_set:
            raise ValueError(
                f"{name} is set, but the coordinates of kept tokens are known to the rank and the"
                " model that embed a whole step, and to no other; leave it out."
            )


@contextmanager
def _long_prompts(images: Any) -> Iterator[None]:
    """Build a language model whose coordinates may run ahead of its columns.

    vLLM does so for videos that it prunes.
    """
    before = images.video_pruning_rate
    images.video_pruning_rate = before or _ANY_RATE
    try:
        yield
    finally:
        images.video_pruning_rate = before


def layout_of(plan: Plan) -> QwenLayout:
    """Of a plan for images of any shape."""
    assert isinstance(plan.layout, QwenLayout)
    return plan.layout


def _of_images(
    values: dict[Any, Tensor], numbers: list[int], grid: tuple[int, int]
) -> dict[Any, Tensor]:
    """Of what was found, [I, N', ...] padded, what belongs to images of one shape."""
    count = grid[0] * grid[1]
    return {key: torch.stack([own[n, :count] for n in numbers]) for key, own in values.items()}


def _like(selection: Selection, tokens: VisualTokens, further: Tensor) -> Tensor:
    """[V, K, ...] of further rows [V, N, ...] of the tokens, kept or mixed as these were."""
    if selection.merge is None:
        return take(further, selection.keep_indices)
    return merge(replace(tokens, features=further), selection.merge)


def _as_is(rows: Tensor) -> Tensor:
    return rows
