"""InternVL (2.5 and 3, as transformers saves them) in vLLM with K visual tokens an image or tile.

T tiles of all images of a call, thumbnails included; P patches of a tile, N tokens of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ocvtp.hosts.families.internvl import means_by_unit
from ocvtp.serving.kept_rows import stacked_rows
from ocvtp.serving.layouts import InternVLLayout, Shape
from ocvtp.serving.plan import Plan
from ocvtp.serving.tower import gathered, layers_wanted
from ocvtp.serving.vllm_core import PrunedInfo, PrunedModel, PrunedProcessor


class PrunedInternVLInfo(PrunedInfo, InternS1ProcessingInfo):
    """See `PrunedInfo`."""

    def largest_shape(self) -> Shape:
        return _layout(self.plan).shape(self.get_max_image_tokens() // self.plan.tower.num_tokens)

    def get_num_frames_with_most_features(self, seq_len: int, mm_counts: Any) -> int:
        """One: videos are not served."""
        return 1


class PrunedInternVLProcessor(PrunedProcessor, InternS1MultiModalProcessor):
    """See `PrunedProcessor`."""

    def shapes(self, mm_items: Any, processed: Any) -> list[Shape]:
        layout = _layout(self.info.plan)
        return [layout.shape(int(count)) for count in processed["image_num_patches"]]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLProcessor, info=PrunedInternVLInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class OCVTPInternVLForConditionalGeneration(PrunedModel, InternS1ForConditionalGeneration):
    """vLLM's InternVL whose language model reads K tokens of every image, or tile."""

    def image_rows(self, asked: list[tuple[int, ...]], **images: Any) -> Sequence[Tensor]:
        given = self._parse_and_validate_image_input(**images)
        counts = [int(count) for count in given["num_patches"]]
        found = self._look(given["pixel_values"])
        pairs = list(zip(counts, asked, strict=True))
        return stacked_rows(self.plan, found, pairs, self.multi_modal_projector)

    def _look(self, pixel_values: Tensor) -> dict[str, Any]:
        """What the pruner reads of the tower, as arguments of `VisualTokens`, of T tiles."""
        needs, served, tower = self.plan.pruner.needs, self.plan.tower, self.vision_tower
        wanted, blocks = set(layers_wanted(needs, served)[0]), tower.encoder.layer
        states, _ = tower.embeddings(pixel_values)
        hidden = {0: states}
        for number, block in enumerate(blocks, start=1):
            states = block(states)
            if number in wanted:
                hidden[number] = states
        last = tower.layernorm(states)
        heads = tower.config.num_attention_heads
        found = gathered(hidden, [*blocks], heads, needs, served, _query_key)
        side = _layout(self.plan).unit_side
        for name in ("hidden", "attention", "keys"):
            found[name] = {
                k: means_by_unit(v, side, self.pixel_shuffle) for k, v in found[name].items()
            }
        if needs.cls:
            found["cls"] = last[:, 0].repeat(1, side**2)
        patches = last[:, 1:]
        rows = round(patches.shape[1] ** 0.5)
        units = self.pixel_shuffle(patches.unflatten(1, (rows, rows)), 1 / side)
        return {"features": units.flatten(1, 2), **found}


def _layout(plan: Plan) -> InternVLLayout:
    assert isinstance(plan.layout, InternVLLayout)
    return plan.layout


def _query_key(block: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """[T, 1 + P, D] queries and keys of a block, normed where it norms them, from its input."""
    attention, normed = block.attention, block.layernorm_before(states)
    queries, keys = attention.q_proj(normed), attention.k_proj(normed)
    if not attention.qk_normalization:
        return queries, keys
    return attention.q_norm(queries), attention.k_norm(keys)
