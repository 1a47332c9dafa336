"""What hosts with a vision tower of transformers, followed by a projector, share.

U are the views of a call (images, or tiles of images); N tokens are those of a view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ocvtp.hosts.base import Encoded, Host, Kept, Savings, Tiling
from ocvtp.hosts.in_tower import skip_unread
from ocvtp.hosts.in_tower.pixels import scale_of
from ocvtp.hosts.in_tower.stages import TowerStages
from ocvtp.hosts.lazy_projection import LaterRows, Rows
from ocvtp.hosts.prompt import tower_output
from ocvtp.hosts.prompt.chat_template import find_processor
from ocvtp.ops.merging import merge
from ocvtp.pruners import Pruner
from ocvtp.structures import Needs, Selection
from ocvtp.towers import taps
from ocvtp.towers.families import look
from ocvtp.towers.hooks import Hook
from ocvtp.towers.module_state import is_compiled, on_device
from ocvtp.transformers_names import (
    DINO_TOWERS,
    PACKED_TOWER,
    both,
    num_registers,
    patch_grid,
)


@dataclass(frozen=True, kw_only=True)
class Placed(Encoded):
    """Images some of whose tokens are not read, or not in this order.

    Args:
        places: [U, M] the row of every token that pruners see, -1 on padding.
    """

    places: Tensor


@dataclass(frozen=True, eq=False)
class _View:
    """The view of a host's tower, as it is now.

    Hooks in the tower hold it and are copied with their modules. A copy of the tower alone shares
    it; only a copy of the whole model gets its own.
    """

    host: ClipFamilyHost

    def __call__(self) -> taps.Tower:
        return self.host.tower_parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> _View:
        is_whole = id(self.host.model) in memo
        return _View(deepcopy(self.host, memo)) if is_whole else self


class ClipFamilyHost(Host):
    """A model with `vision_tower` and `multi_modal_projector`, all tokens of a layer between them.

    Raises:
        ValueError: for other towers than `towers` names.
    """

    family: ClassVar[str]
    """Its name in messages."""
    towers: ClassVar[dict[str, int]] = {
        "clip_vision_model": 1,
        "siglip_vision_model": 0,
        **dict.fromkeys(DINO_TOWERS, 1),
    }
    """The `model_type` of its towers, and whether each has a CLS (1) or none (0)."""
    image_keys: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_sizes",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )

    refused: ClassVar[Mapping[str, str]] = {}
    """Those that its towers do not take, and why."""

    _tower_stages: TowerStages | None = None

    def __init__(
        self, model: Any, tiling: Tiling | None = None, savings: Savings | None = None
    ) -> None:
        super().__init__(model, tiling, savings)
        kind = self.tower.config.model_type
        if kind not in self.towers:
            packed = " (SigLIP2 where images have one size)" if kind == PACKED_TOWER else ""
            raise ValueError(
                f"this {self.family} has a {kind} tower; visual tokens can be pruned after"
                f" {' and '.join(self.towers)}{packed}."
            )
        self._num_registers = num_registers(self.tower.config)

    @property
    def tower(self) -> Any:
        return self.model.model.vision_tower

    @property
    def _projector(self) -> nn.Module:
        projector: nn.Module = self.model.model.multi_modal_projector
        return projector

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self._projector,)

    def tower_parts(self) -> taps.Tower:
        return look(self.tower)

    @property
    def num_prefix(self) -> int:
        return self._has_cls + self.num_registers

    @property
    def _has_cls(self) -> bool:
        return bool(self.towers[self.tower.config.model_type])

    @property
    def num_registers(self) -> int:
        return self._num_registers

    def _refuse_registers(self) -> None:
        """For families whose images are packed by their grids.

        Raises:
            ValueError: if the tower has registers.
        """
        if self.num_registers:
            raise ValueError(
                f"the vision tower of this {self.family} has {self.num_registers} registers, which"
                " its packing of tiles by rows and columns does not take, pruned or not; use a"
                " tower without registers, or a LLaVA-1.5 (model_type llava)."
            )

    @property
    def grid_hw(self) -> tuple[int, int] | None:
        return self._usual_grid

    @property
    def _usual_grid(self) -> tuple[int, int]:
        """Of images of the size that the tower's settings name."""
        return patch_grid(self.tower.config)

    def _inside(self, needs: Needs) -> Needs:
        """What to tap in the tower, the selected layer included where its CLS is wanted."""
        hidden = needs.hidden
        if needs.cls:
            hidden = (*hidden, self.model.config.vision_feature_layer)
        return replace(needs, hidden=hidden)

    def check(self, needs: Needs) -> None:
        if needs.reads_cls and not self._has_cls:
            raise ValueError(
                f"the pruner reads the CLS token, which a {self.tower.config.model_type} has not;"
                " use `received` attention where the method offers it, or a pruner without CLS."
            )
        if needs.cls and not isinstance(self.model.config.vision_feature_layer, int):
            raise ValueError(
                "the pruner reads the CLS of the selected layer, but this model selects several:"
                f" vision_feature_layer={self.model.config.vision_feature_layer}; use a pruner"
                " that does not (see `ocvtp list`)."
            )
        self._check_clip(needs)
        view = self.tower_parts()
        for layer in self._inside(needs).hidden:
            view.layer(layer)
        for block in needs.blocks:
            view.block(block)

    def _check_clip(self, needs: Needs) -> None:
        layer = self.model.config.vision_feature_layer
        if needs.clip and self.tower.config.model_type != "clip_vision_model":
            raise ValueError(
                "the pruner compares images with the prompt in CLIP's space, where the tokens of a"
                f" {self.tower.config.model_type} are not; use a pruner that reads the language"
                " model's `text`, or none of the prompt (see `ocvtp list`)."
            )
        if needs.clip and not isinstance(layer, int):
            raise ValueError(
                "the pruner takes the tokens of one layer to CLIP's space, but this model selects"
                f" several: vision_feature_layer={layer}; use a pruner that does not."
            )

    @property
    def hook_settings(self) -> Any:
        """A pruner may read the CLS of the selected layer."""
        return self.model.config.vision_feature_layer

    def hooks(self, needs: Needs) -> list[Hook]:
        hooks = taps.hooks_for(self.tower_parts(), self._inside(needs))
        hooks.append(taps.keep_features_of(self._projector))
        if self._tower_stages is not None:
            hooks += self._tower_stages.hooks(self.tower)
        if self._may_cut:
            view, readers = self.tower_parts(), self._readers(needs)
            asked = {view.block(b) for some in readers for b in some.blocks}
            hooks += skip_unread.hooks(view.blocks, self._after_blocks(), asked)
        if self._may_project_later:
            hooks += skip_unread.hooks_of_projector(self._projector)
        return hooks

    def savings_for(self, needs: Needs) -> Savings:
        """For the layers that the model's config selects."""
        first_unread = self._first_unread(self.tower_parts(), {}, needs)
        return replace(
            self.savings,
            cut_tower=self._may_cut and first_unread <= self._last_half,
            project_kept=self._may_project_later and not needs.projected,
        )

    @property
    def _may_cut(self) -> bool:
        return self.savings.cut_tower and not is_compiled(self.tower)

    @property
    def _may_project_later(self) -> bool:
        return self.savings.project_kept and not is_compiled(self._projector)

    def _after_blocks(self) -> list[nn.Module]:
        """The tower's norm, and the head that pools what it gives."""
        names = ("post_layernorm", "head", "layernorm", "norm")
        return [getattr(self.tower, name) for name in names if hasattr(self.tower, name)]

    @property
    def _last_half(self) -> int:
        """The number of the last module that `skip_unread` may leave out."""
        return 2 * self.num_tower_blocks + len(self._after_blocks()) - 1

    def _first_unread(self, view: taps.Tower, images: dict[str, Any], needs: Needs) -> int:
        """From where on nobody reads the tower, see `skip_unread.first_unread`."""
        layers, readers = self.layers_read(images), self._readers(needs)
        if tower_output.is_asked(images):
            return self._last_half + 1
        return skip_unread.first_unread(view, layers, readers)

    def _readers(self, needs: Needs) -> list[Needs]:
        """What is read of the tower besides the layers that go to the projector."""
        readers = [self._inside(needs)]
        if self._tower_stages is not None and self._tower_stages.dropper is not None:
            readers.append(self._tower_stages.dropper.needs)
        return readers

    def set_stages(self, parts: Sequence[Pruner], needs: Needs, processor: Any = None) -> None:
        if not parts:
            return
        scale = None
        if any(part.stage == "pixels" for part in parts):
            processor = find_processor(self.model) if processor is None else processor
            scale = scale_of(processor, self.tower.config.model_type)
        patch, _ = both(self.tower.config.patch_size)
        for part in parts:
            self.check(part.needs)
        stages = TowerStages(parts, _View(self), self.num_prefix, patch, scale)
        stages.check(needs, self.tower.config._attn_implementation)
        self._tower_stages = stages

    def _look_inside(
        self, images: dict[str, Any], needs: Needs, per_token: bool = True
    ) -> tuple[Any, dict[str, Any], bool]:
        """Run the model's own image encoding.

        Args:
            images: the arguments that `image_keys` names.
            needs: as given to `install`.
            per_token: whether every row that is read is one token, or none.

        Returns:
            the model's own output, with what the language model would read of each image, and
            arguments of `VisualTokens` for the U views: `features` [U, N, D] and what `needs` names
            of the tower; `valid` where only some of the tokens ran: the others are not there. Last,
            whether the first has zeros in the place of tokens, because the projector has not run
            yet.

        Raises:
            ValueError: for settings of the call that the pruner cannot work with.
            RuntimeError: if a hook did not fire.
        """
        self._check_settings(images, needs)
        stages, tower, num_prefix = self._tower_stages, self.tower, self.num_prefix
        inside, view = self._inside(needs), self.tower_parts()
        eager = self.eager_tower(needs, acts=stages is not None)
        with taps.recording(tower) as record, on_device(self.model.model), eager:
            if stages is not None:
                attention = tower.config._attn_implementation
                stages.begin(record, self.layers_read(images), attention)
            record.first_unread = self._first_unread(view, images, needs)
            if per_token and not needs.projected:
                record.projected_width = self.model.config.get_text_config().hidden_size
            output = self.model.model.get_image_features(**images, return_dict=True)
        if (features := record.features) is None:
            raise RuntimeError(
                "the projector ran but its hook did not fire: attach the pruner before the model"
                " is compiled."
            )
        found = taps.gather(record, view, inside, num_prefix)
        if stages is not None:
            stages.watch(tower, features)
        if needs.cls:
            found["cls"] = self._selected(record)[:, 0]
        if stages is not None and (ran := stages.ran(record)) is not None:
            found["valid"] = ran
        first_unread = record.first_unread if record.is_cut else None
        output = tower_output.known(output, first_unread, stages is None)
        return output, {"features": features, **found}, record.is_projected_later

    def _rows(
        self, rows: Sequence[Tensor], later: bool, features: Tensor, source: Tensor | None = None
    ) -> Rows:
        """What the language model would read of the images, see `LaterRows`; `later` if zeros."""
        if not later and not self._may_project_later:
            return torch.cat(list(rows))
        return LaterRows.of(features, self._projector, source, None if later else rows)

    def layers_read(self, images: dict[str, Any]) -> list[int]:
        chosen = images.get("vision_feature_layer")
        layers = self.model.config.vision_feature_layer if chosen is None else chosen
        return [layers] if isinstance(layers, int) else list(layers)

    def _selected(self, record: taps.Recording) -> Tensor:
        """[U, T, D] the selected layer, CLS included."""
        return record.hidden[self.tower_parts().layer(self.model.config.vision_feature_layer)]

    def _check_settings(self, images: dict[str, Any], needs: Needs) -> None:
        strategy = self._strategy(images)
        wanted = "default" if self._has_cls else "full"
        if strategy != wanted:
            raise ValueError(
                f"vision_feature_select_strategy={strategy!r} does not hand the language model the"
                f" token grid of a {self.tower.config.model_type}; pass {wanted!r}."
            )
        selected = self.model.config.vision_feature_layer
        chosen = images.get("vision_feature_layer")
        if needs.cls and chosen not in (None, selected):
            raise ValueError(
                f"the pruner reads the CLS of layer {selected}, but vision_feature_layer={chosen}"
                " takes the tokens of another; set model.config.vision_feature_layer before you"
                " attach the pruner."
            )
        if needs.clip and not isinstance(selected if chosen is None else chosen, int):
            raise ValueError(
                f"the pruner takes the tokens of one layer to CLIP's space; vision_feature_layer="
                f"{chosen} are several; pass one."
            )
        for name, why in self.refused.items():
            if images.get(name) is not None:
                raise ValueError(why)

    def _strategy(self, images: dict[str, Any]) -> str:
        chosen = images.get("vision_feature_select_strategy")
        return str(chosen or self.model.config.vision_feature_select_strategy)

    def _grid(self, pixel_values: Tensor, num_tokens: int) -> tuple[int, int]:
        sides = both(self.tower.config.patch_size)
        height, width = (n // side for n, side in zip(pixel_values.shape[-2:], sides, strict=True))
        assert height * width == num_tokens, (height, width, num_tokens)
        return height, width

    def _kept(
        self,
        encoded: Encoded,
        selection: Selection,
        places: Tensor,
        registers: Tensor | None = None,
    ) -> Kept:
        """What was selected, in the order of `selection`; with registers, in that of all rows.

        Args:
            encoded: the images.
            selection: of their tokens.
            places: [I, K] where the kept tokens are among all rows that the language model reads.
            registers: [n] where the rows are that always stay; None where there are none.
        """
        valid, order = selection.valid, None
        positions = places.flatten() if valid is None else places[valid]
        rows = None
        if selection.merge is not None:
            mixed = self._projector(merge(encoded.tokens, selection.merge))  # [I, K, D']
            rows = mixed.flatten(0, 1) if valid is None else mixed[valid]
        device = encoded.embeddings.device
        if registers is not None:
            registers = registers.to(positions.device)
            if rows is not None:
                rows = torch.cat([rows, encoded.embeddings[registers.to(device)].to(rows)])
            positions, order = torch.cat([positions, registers]).sort()
        if rows is None:
            return Kept(positions, encoded.embeddings[positions.to(device)])
        return Kept(positions, rows if order is None else rows[order.to(rows.device)])
