"""The vision tower of Qwen2.5-VL, frozen and cut.

Images of H x W pixels, P patches of all of them, 4 of them a visual token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, CLIPImageProcessor, PreTrainedConfig

from ocvtp.encoders.base import DType, FrozenEncoder
from ocvtp.encoders.clip import ProcessorTransform
from ocvtp.structures import Needs, VisualTokens
from ocvtp.towers import taps
from ocvtp.towers.windows import Units, window_order
from ocvtp.transformers_names import qwen_image_size, qwen_vision_tower

RANDOM_TOWERS: dict[str, dict[str, Any]] = {
    "tiny-qwen2.5-vl": {
        "depth": 6,
        "fullatt_block_indexes": [2, 5],
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 4,
        "out_hidden_size": 96,
        "window_size": 112,
        "initializer_range": 0.2,
    },
    "Qwen2.5-VL-7B-Instruct": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
"""Towers with random weights, named `random:NAME`."""


class QwenEncoder(FrozenEncoder):
    """The frozen tower of a Qwen2.5-VL, cut after the layer that is read.

    A token is a unit of 2 x 2 patches, and what is read of it is their mean, as the host shows
    it to pruners. Images are cut to one square size, or keep their shape, as the host shows
    them; the trained pruner serves any.

    Args:
        tower: hub id or folder of a Qwen2.5-VL, or `random:NAME`.
        layer: number of hidden states that the OC-pruner reads; i is the output of block i - 1.
        image_size: of square images, a multiple of the unit's side (28 pixels); where images keep
            their shape, of the image that the decoder's stored positions are for.
        max_pixels: None for square images; else images keep their shape and have so many pixels at
            most, by the rule of Qwen's own processor.
        min_pixels: the fewest pixels of an image then.
        dtype: of weights and computation.
        seed: of random weights.
    """

    def __init__(
        self,
        tower: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        layer: int = 12,
        image_size: int = 448,
        max_pixels: int | None = None,
        min_pixels: int = 56 * 56,
        dtype: DType = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(dtype)
        self._source, self._seed = tower, seed
        self._is_random = tower.startswith("random:")
        self._config = config = _config(tower)
        self._unit = unit = config.patch_size * config.spatial_merge_size
        if image_size < unit or image_size % unit:
            raise ValueError(f"image_size={image_size}; pass a multiple of {unit} pixels.")
        self.tower_id = tower
        self.layer = taps.resolve(layer, config.depth + 1, "hidden_states")
        self.feature_dim = config.hidden_size
        self.grid_hw = (image_size // unit, image_size // unit)
        self.num_prefix, self.patch_size = 0, unit
        self._max_pixels = max_pixels
        self.transform = ProcessorTransform(_processor(image_size))
        if max_pixels is not None:
            if not unit**2 <= min_pixels <= max_pixels:
                raise ValueError(
                    f"min_pixels={min_pixels}, max_pixels={max_pixels}; pass at least {unit**2} and"
                    " no fewer at most."
                )
            self.layout = "variable"
            self.transform = QwenTransform(unit, min_pixels, max_pixels)

    @property
    def depth(self) -> int:
        return int(self._config.depth)

    @property
    def max_tokens(self) -> int:
        """Most tokens of an image."""
        if self._max_pixels is None:
            return super().max_tokens
        return int(self._max_pixels // self._unit**2)

    def _build(self, num_blocks: int) -> nn.Module:
        config = copy.deepcopy(self._config)
        if self._is_random:
            # Draw all blocks, so that the first ones are those of the whole tower.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                tower: Any = qwen_vision_tower()(config)
            tower.blocks = tower.blocks[:num_blocks]
        else:
            config.depth = num_blocks
            tower, info = qwen_vision_tower().from_pretrained(
                self._source,
                config=config,
                dtype=self.dtype,
                output_loading_info=True,
                key_mapping={r"^(model\.)?visual\.": ""},
            )
            if missing := sorted(info["missing_keys"]):
                raise ValueError(
                    f"{self._source!r} lacks {len(missing)} weights of the vision tower, e.g."
                    f" {missing[:3]}; pass the id or folder of a Qwen2.5-VL."
                )
        tower.merger = nn.Identity()  # what the language model would read is not read here
        built: nn.Module = tower
        return built

    def _view(self, tower: nn.Module) -> taps.Tower:
        def fused(block: Any) -> tuple[nn.Module, nn.Module]:
            raise AssertionError("queries and keys come from one module")

        blocks: Any = tower.blocks
        return taps.Tower(blocks, self._config.num_heads, fused)

    def check(self, needs: Needs) -> None:
        if needs != Needs(hidden=needs.hidden):
            raise ValueError(
                f"the encoder of Qwen2.5-VL supplies hidden states alone, not {needs}; use an"
                " objective that reads these, or the host, which supplies more."
            )
        super().check(needs)

    def load(self, needs: Needs) -> FrozenEncoder:
        """Read the weights of the blocks that `needs` reaches.

        Raises:
            ValueError: if more than hidden states is asked for.
        """
        self.check(needs)
        return super().load(needs)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> VisualTokens:
        """Encode.

        Args:
            pixel_values: B times [3, H, W] as `transform` makes them, H and W multiples of a unit.
            image_sizes: not used.

        Returns:
            The visual tokens with the hidden states that `load` was asked for, in fp32; `grids` and
            `valid` where images have different grids.
        """
        del image_sizes
        if self.needs is None:
            raise RuntimeError("call load(needs) before the encoder runs.")
        config, side = self._config, self._config.spatial_merge_size
        grids = [(i.shape[1] // self._unit, i.shape[2] // self._unit) for i in pixel_values]
        packed = torch.cat([patches(i[None].to(self.dtype), config) for i in pixel_values])
        shapes = [[1, rows * side, columns * side] for rows, columns in grids]
        with taps.recording() as record:
            self.tower(packed, grid_thw=torch.tensor(shapes, device=packed.device))
        order = window_order(grids, config.window_size // self._unit)
        units = Units(side**2, [rows * columns for rows, columns in grids], order.argsort())
        pairs = zip(self.needs.hidden, self._asked.hidden, strict=True)
        hidden = {i: units.raster(record.hidden[layer]).float() for i, layer in pairs}
        features = next(iter(hidden.values()))
        tokens = VisualTokens(features, grids[0], hidden=hidden, num_heads=config.num_heads)
        if len(set(grids)) == 1:
            return tokens
        sizes = torch.tensor(grids, device=features.device)  # [B, 2]
        places = torch.arange(features.shape[1], device=features.device)
        return replace(
            tokens,
            grid_hw=self.grid_hw,
            grids=sizes[:, None],
            valid=places < sizes.prod(dim=1, keepdim=True),
        )


def patches(pixel_values: Tensor, config: Any) -> Tensor:
    """[B, 3, H, W] -> [P, 3 * frames * patch * patch], unit after unit, an image's frames alike."""
    side, patch, frames = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
    split = pixel_values.unflatten(3, (-1, side, patch)).unflatten(2, (-1, side, patch))
    # The axes are B, 3, rows, side, patch, columns, side, patch: of image, unit and patch.
    units = split.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4)  # [P, 3, patch, patch]
    packed: Tensor = units[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)
    return packed


class QwenTransform(ProcessorTransform):
    """Images in their own shape, as Qwen's processor makes them before it cuts them into patches.

    Args:
        unit: sides are multiples of so many pixels.
        min_pixels: the fewest of an image.
        max_pixels: the most of an image.
    """

    def __init__(self, unit: int, min_pixels: int, max_pixels: int) -> None:
        super().__init__(CLIPImageProcessor(do_center_crop=False))
        self._rule = {"factor": unit, "min_pixels": min_pixels, "max_pixels": max_pixels}

    def _settings(self, image: Image.Image) -> dict[str, Any]:
        height, width = qwen_image_size(image.height, image.width, **self._rule)
        return {"size": {"height": height, "width": width}}

    def describe(self) -> dict[str, Any]:
        plain = super().describe() | {"image_processor_type": "Qwen2VLImageProcessor"}
        return {name: plain[name] for name in plain.keys() - {"size", "crop_size"}} | self._rule


def _processor(size: int) -> Any:
    """Square images in the colours of Qwen's own processor, which are CLIP's."""
    return CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def _config(tower: str) -> PreTrainedConfig:
    if tower.startswith("random:"):
        name = tower.removeprefix("random:")
        if name not in RANDOM_TOWERS:
            raise ValueError(f"{tower!r} is unknown; random towers are {sorted(RANDOM_TOWERS)}.")
        return AutoConfig.for_model("qwen2_5_vl", vision_config=RANDOM_TOWERS[name]).vision_config
    try:
        config = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tower={tower!r} is neither a folder with a config.json nor a hub id that can be"
            f" reached now nor one of {['random:' + n for n in sorted(RANDOM_TOWERS)]}."
        ) from error
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"tower={tower!r} is a {config.model_type}; pass a Qwen2.5-VL.")
    return config.vision_config
