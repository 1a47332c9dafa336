"""LLaVA-1.5 in transformers: a CLIP or SigLIP tower, N = H W tokens an image.

I images, N tokens of an image, D width of the tower, D' width of the language model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocvtp.encoders import taps
from ocvtp.hosts.base import Encoded, Host, Kept, merge, on_device
from ocvtp.structures import Needs, Selection, VisualTokens

_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # tokens before the patches


class LlavaHost(Host):
    """LLaVA-1.5 and models of its architecture.

    Raises:
        ValueError: for other towers than CLIP and SigLIP, and for settings under which the tokens
            are no grid.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    image_keys: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_sizes",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        kind = self.tower.config.model_type
        if kind not in _TOWERS:
            raise ValueError(
                f"this LLaVA has a {kind} tower; visual tokens can be pruned behind"
                f" {' and '.join(_TOWERS)}."
            )
        self._num_prefix = _TOWERS[kind]

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return self.model.model.vision_tower

    @property
    def _projector(self) -> nn.Module:
        projector: nn.Module = self.model.model.multi_modal_projector
        return projector

    def _view(self) -> taps.Tower:
        return taps.clip_tower(self.tower)

    def _inside(self, needs: Needs) -> Needs:
        """What to tap in the tower, the selected layer included where its CLS is wanted."""
        hidden = needs.hidden
        if needs.cls:
            hidden = (*hidden, self.model.config.vision_feature_layer)
        return replace(needs, hidden=hidden)

    def check(self, needs: Needs) -> None:
        """See `Host.check`."""
        asks_cls = needs.cls or needs.cls_queries or any(k == "cls" for _, k in needs.attention)
        if asks_cls and self._num_prefix == 0:
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
        view = self._view()
        for layer in self._inside(needs).hidden:
            view.layer(layer)
        for block in [*needs.keys, *(block for block, _ in needs.attention)]:
            view.block(block)

    def _check_clip(self, needs: Needs) -> None:
        layer = self.model.config.vision_feature_layer
        if needs.clip and self._num_prefix == 0:
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

    def install(self, needs: Needs) -> list[RemovableHandle]:
        """See `Host.install`."""
        handles = taps.install(self._view(), self._inside(needs))
        return [*handles, taps.keep_input_of(self._projector, "features")]

    def encode(self, images: dict[str, Any], needs: Needs) -> Encoded:
        """See `Host.encode`."""
        self._check_settings(images, needs)
        with taps.recording() as record, on_device(self.model.model), self.eager_tower(needs):
            output = self.model.model.get_image_features(**images, return_dict=True)
        embeddings = torch.stack(list(output.pooler_output))  # [I, N, D']
        features = record.other.get("features")
        if features is None:
            raise RuntimeError(
                "the projector ran but its hook did not fire: attach the pruner before the model"
                " is compiled."
            )
        found = taps.gather(record, self._view(), self._inside(needs), self._num_prefix)
        if needs.cls:
            layer = self._view().layer(self.model.config.vision_feature_layer)
            found["cls"] = record.hidden[layer][:, 0]
        tokens = VisualTokens(
            features=features,
            grid_hw=self._grid(images["pixel_values"], features.shape[1]),
            projected=embeddings if needs.projected else None,
            **found,
        )
        return Encoded(tokens, embeddings.flatten(0, 1))

    def apply(self, encoded: Encoded, selection: Selection) -> Kept:
        """See `Host.apply`."""
        images, num_tokens = encoded.tokens.features.shape[:2]
        keep = selection.keep_indices
        first = num_tokens * torch.arange(images, device=keep.device)[:, None]
        positions = (keep + first).flatten()  # [I K]
        if selection.merge is None:
            rows = encoded.embeddings[positions]
        else:
            mixed = merge(encoded.tokens, selection.merge)
            rows = torch.as_tensor(self._projector(mixed)).flatten(0, 1)
        if selection.valid is not None:
            real = selection.valid.flatten()
            positions, rows = positions[real], rows[real]
        return Kept(positions, rows)

    def _check_settings(self, images: dict[str, Any], needs: Needs) -> None:
        strategy = images.get("vision_feature_select_strategy")
        strategy = strategy or self.model.config.vision_feature_select_strategy
        wanted = "default" if self._num_prefix else "full"
        if strategy != wanted:
            raise ValueError(
                f"vision_feature_select_strategy={strategy!r} does not hand the language model the"
                f" token grid of a {self.tower.config.model_type}; pass {wanted!r}."
            )
        if images.get("image_sizes") is not None:
            raise ValueError("image_sizes belong to Pixtral towers; leave them out.")
        selected, chosen = (
            self.model.config.vision_feature_layer,
            images.get("vision_feature_layer"),
        )
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

    def _grid(self, pixel_values: Tensor, num_tokens: int) -> tuple[int, int]:
        patch = self.tower.config.patch_size
        height, width = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
        assert height * width == num_tokens, (height, width, num_tokens)
        return height, width
