"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, packed one after the other, in units.

N units of the largest image, R of all; P patches of all images, 4 of them a unit; E decoder layers
that add rows of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ocvtp.hosts.base import Encoded, Host, Kept, Tiny
from ocvtp.hosts.in_llm.hooks import deepstack_hook
from ocvtp.hosts.prompt import tower_output
from ocvtp.ops.merging import merge
from ocvtp.random_models import tiny_qwen
from ocvtp.structures import Needs, Selection, VisualTokens, take
from ocvtp.towers import taps
from ocvtp.towers.hooks import Hook
from ocvtp.towers.module_state import on_device
from ocvtp.towers.windows import (
    PackedBlock,
    Units,
    gather,
    window_order,
    window_sizes,
)

_NO_GRID = (0, 0)
_USUAL_SIDE = 672  # pixels


class QwenHost(Host):
    """A model of the Qwen-VL family.

    A visual token is a unit of 2 x 2 patches, and pruners see it as the language model would:
    `features` and `projected` are both what the merger makes of it. `hidden` and `keys` are means
    over a unit's patches, in raster order; keys are those before rotation, since methods
    compare what they hold and not where they are. `received` attention is the
    mean over the queries of a patch's own segment (the image, or a window where the tower has
    those), averaged over the unit; `given` is the mean over the segment's keys, which is the same
    for all its patches. Where images differ in size, `valid` marks real tokens; where they differ
    in shape, there is no grid.

    Tokens keep the three coordinates that they had, whatever `attach(positions=...)` says. Merging
    methods mix what the merger made, and each mixture has the coordinates of its place.
    """

    image_keys: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    plain_positions_tell: ClassVar[bool] = False
    features_are_projected: ClassVar[bool] = True
    counts_operations: ClassVar[bool] = True
    family: ClassVar[str]
    """Its name in messages."""

    @property
    def tower(self) -> Any:
        return self.model.model.visual

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        """The merger, and one for each of the layers of DeepStack."""
        return (self.tower.merger, *getattr(self.tower, "deepstack_merger_list", ()))

    @property
    def unit_side(self) -> int:
        return int(self.tower.spatial_merge_size)

    @property
    def usual_tokens(self) -> int:
        """Of a square of 672 pixels."""
        return int(_USUAL_SIDE // (self.tower.config.patch_size * self.unit_side)) ** 2

    def tower_parts(self) -> taps.Tower:
        def fused(block: Any) -> tuple[nn.Module, nn.Module]:
            raise AssertionError("queries and keys come from one module")

        return taps.Tower(self.tower.blocks, self.tower.config.num_heads, fused)

    def check(self, needs: Needs) -> None:
        if needs.reads_cls:
            raise ValueError(
                f"the pruner reads the CLS token, which the tower of {self.family} has not; use"
                " `received` attention where the method offers it, or a pruner without CLS."
            )
        if needs.clip:
            raise ValueError(
                "the pruner compares images with the prompt in CLIP's space, where the tokens of"
                f" {self.family} are not; use a pruner that reads the language model's `text`, or"
                " none of the prompt (see `ocvtp list`)."
            )
        view = self.tower_parts()
        for layer in needs.hidden:
            view.layer(layer)
        for block in needs.blocks:
            view.block(block)

    def hooks(self, needs: Needs) -> list[Hook]:
        view = self.tower_parts()
        hooks = taps.hooks_for(view, Needs(hidden=needs.hidden))
        for number in sorted({view.block(block) for block in needs.blocks}):
            hooks += taps.keep_fused_of(number, self.tower.blocks[number].attn)
        return hooks

    def encode(self, images: dict[str, Any], needs: Needs) -> Encoded:
        grids = self._grids(images)
        with (
            taps.recording(self.tower) as record,
            on_device(self.model.model),
            self.eager_tower(needs),
        ):
            output = self.model.model.get_image_features(**images, return_dict=True)
        embeddings = torch.cat(list(output.pooler_output))  # [R, D']
        counts = [height * width for height, width in grids]
        units = Units(self.unit_side**2, counts, self._places(grids))
        features = units.split(embeddings)
        sizes = torch.tensor(counts, device=embeddings.device)
        places = torch.arange(features.shape[1], device=embeddings.device)
        tokens = VisualTokens(
            features=features,
            grid_hw=grids[0] if len(set(grids)) == 1 else _NO_GRID,
            valid=None if len(set(counts)) == 1 else places < sizes[:, None],
            projected=features if needs.projected else None,
            num_heads=self.tower.config.num_heads,
            **self._found(record, needs, units),
        )
        layers = [units.split(rows) for rows in self._layer_rows(output)]
        return Encoded(
            tokens,
            embeddings,
            starts=sizes.cumsum(dim=0) - sizes,
            deepstack=torch.stack(layers) if layers else None,
            output=tower_output.known(output),
        )

    def _places(self, grids: Sequence[tuple[int, int]]) -> Tensor:
        """[R] where in the order in which the tower runs each unit is."""
        return torch.arange(sum(height * width for height, width in grids))

    def _layer_rows(self, output: Any) -> list[Tensor]:
        """[R, D'] for each of the E decoder layers that add rows of the tower."""
        return []

    def _grids(self, images: dict[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of each image's units."""
        if images.get("image_grid_thw") is None or images.get("pixel_values") is None:
            raise ValueError(
                f"{self.family} takes pixel_values and image_grid_thw together; pass both as the"
                " processor returns them."
            )
        sizes = images["image_grid_thw"].tolist()
        if any(frames != 1 for frames, _, _ in sizes):
            raise ValueError(
                f"image_grid_thw={sizes} has several frames; videos are not pruned, call the model"
                " without the pruner for them."
            )
        return [(height // self.unit_side, width // self.unit_side) for _, height, width in sizes]

    def _found(self, record: taps.Recording, needs: Needs, units: Units) -> dict[str, Any]:
        """What `needs` names of the tower, as keyword arguments of `VisualTokens`."""
        blocks = {}
        for number, fused in record.fused.items():
            queries, keys, _ = fused.chunk(3, dim=1)
            turns, ends = record.turns[number], record.segment_ends[number]
            blocks[number] = PackedBlock(queries, keys, turns, ends)
        return gather(blocks, record.hidden, self.tower_parts(), needs, units)

    def apply(self, encoded: Encoded, selection: Selection) -> Kept:
        tokens, keep = encoded.tokens, selection.keep_indices
        positions = (keep + encoded.first_rows(keep.device)[:, None]).flatten()  # [I K]
        real = slice(None) if selection.valid is None else selection.valid.flatten()
        layers = [] if encoded.deepstack is None else list(encoded.deepstack)
        if selection.merge is None:
            embeddings = encoded.embeddings[positions[real].to(encoded.embeddings.device)]
            places = keep.clamp(0, tokens.num_tokens - 1)  # what does not count may be anything
            rows = [take(layer, places.to(layer.device)) for layer in layers]
        else:
            embeddings = merge(tokens, selection.merge).flatten(0, 1)[real]
            rows = [merge(replace(tokens, features=layer), selection.merge) for layer in layers]
        deepstack = torch.stack([row.flatten(0, 1)[real] for row in rows]) if rows else None
        return Kept(positions[real], embeddings, deepstack)

    def picture(self, images: dict[str, Any]) -> Tensor:
        """Patches put together, the first of their equal frames."""
        rows, columns = self._grids(images)[0]
        side, config = self.unit_side, self.tower.config
        patch = config.patch_size
        patches = images["pixel_values"][: rows * columns * side**2]
        sizes = (rows, columns, side, side, -1, config.temporal_patch_size, patch, patch)
        frame = patches.reshape(sizes)[:, :, :, :, :, 0]  # rows, columns, rows, columns, 3, H, W
        return frame.permute(4, 0, 2, 5, 1, 3, 6).flatten(4, 6).flatten(1, 3)

    def rope_positions(self, inputs: dict[str, Any], images: dict[str, Any]) -> Tensor:
        """[3, B, L], those of the caller if there are any."""
        ids, given = inputs["input_ids"], inputs.get("position_ids")
        if given is not None:  # [B, L], [3, B, L], or [4, B, L] with the columns' numbers first
            places: Tensor = (given if given.ndim == 2 else given[-3:]).to(ids.device)
            return places.expand(3, *ids.shape)
        types = inputs.get("mm_token_type_ids")
        if types is None:
            types = (ids == self.image_token_id).int()
        places, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=types.to(ids.device),
            image_grid_thw=images["image_grid_thw"],
            attention_mask=inputs.get("attention_mask"),
        )
        return places

    def set_rope_deltas(self, deltas: Tensor | None) -> None:
        """Hand-written decode loops continue from there."""
        if deltas is not None:
            self.model.model.rope_deltas = deltas


class Qwen2VLHost(QwenHost):
    """Qwen2-VL; see `QwenHost`."""

    tiny: ClassVar[Tiny | None] = Tiny(tiny_qwen.tiny_qwen2, tiny_qwen.SPECIAL_TOKENS)
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    family: ClassVar[str] = "Qwen2-VL"


class Qwen25VLHost(QwenHost):
    """Qwen2.5-VL; see `QwenHost`.

    Attention sums to 1 over a segment, so patches of a small window at the edge have more of it:
    for methods that compare tokens of the whole image, choose a block of `fullatt_block_indexes`,
    e.g. -1.
    """

    tiny: ClassVar[Tiny | None] = Tiny(tiny_qwen.tiny_qwen, tiny_qwen.SPECIAL_TOKENS)
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    family: ClassVar[str] = "Qwen2.5-VL"

    @property
    def _window(self) -> int:
        """Units along the side of a window."""
        config = self.tower.config
        return int(config.window_size // config.patch_size // config.spatial_merge_size)

    def segments(self, block: int, grid_hw: tuple[int, int]) -> list[int]:
        """Windows, of which those at the edge may be smaller."""
        if block in self.tower.config.fullatt_block_indexes:
            return super().segments(block, grid_hw)
        return [size * self.unit_side**2 for size in window_sizes(grid_hw, self._window)]

    def _places(self, grids: Sequence[tuple[int, int]]) -> Tensor:
        return window_order(grids, self._window).argsort()


class Qwen3VLHost(QwenHost):
    """Qwen3-VL; see `QwenHost`.

    Tokens that are kept keep the rows that the first decoder layers add to them (DeepStack), and
    merging methods mix these as they mix the tokens. Pruners do not see them.
    """

    tiny: ClassVar[Tiny | None] = Tiny(tiny_qwen.tiny_qwen3, tiny_qwen.SPECIAL_TOKENS)
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    family: ClassVar[str] = "Qwen3-VL"
    plain_positions_tell: ClassVar[bool] = True

    @property
    def num_deepstack_layers(self) -> int:
        return len(self.tower.config.deepstack_visual_indexes)

    def hooks(self, needs: Needs) -> list[Hook]:
        return [*super().hooks(needs), deepstack_hook(self.language_model)]

    def _layer_rows(self, output: Any) -> list[Tensor]:
        # transformers 5.17 leaves the images together
        found = output.deepstack_features
        return [rows if isinstance(rows, Tensor) else torch.cat(rows) for rows in found]
