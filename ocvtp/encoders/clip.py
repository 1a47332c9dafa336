"""Vision towers of transformers, frozen and cut: CLIP, SigLIP, SigLIP2, DINOv2 and DINOv3."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
)
from transformers.utils import logging as hf_logging

from ocvtp.encoders.base import DType, FrozenEncoder
from ocvtp.random_models.clip_config import (
    plain_processor,
    random_tower,
    resized,
    square_processor,
    vision_config,
)
from ocvtp.shipped import find_weights
from ocvtp.towers import taps
from ocvtp.towers.families import look
from ocvtp.transformers_names import (
    CLIP_TOWERS,
    DINO_TOWERS,
    PACKED_TOWER,
    both,
    image_size,
    packed_images,
    patch_grid,
    prefix_tokens,
)

_PREFIX_OF_LLAVA = {r"^(model\.)?vision_tower\.": ""}
_PREFIX = {r"^(model\.)?(vision_tower\.)?(vision_model\.)?": ""}
"""What weights of a tower are called in a checkpoint of more than that."""


class CLIPEncoder(FrozenEncoder):
    """A frozen tower of the kinds that a LLaVA may have, cut after the layer that is read.

    CLIP, SigLIP, SigLIP2, DINOv2 (with registers or without) and DINOv3. A DINO tower takes images
    of the size that the image processor makes, or of `img_size`; its registers are no tokens, and
    DINOv3's keys are those before rotation. SigLIP2's tower for images of any shape
    (`Siglip2VisionModel`) is given the square that its own positions are for.

    Args:
        tower: hub id or folder (of the tower, of a whole CLIP or SigLIP, or of a LLaVA),
            `random:NAME`, or a dictionary of settings for random weights.
        layer: number of `hidden_states` that the OC-pruner reads; paper: 9 of CLIP ViT-L/14-336.
        dtype: of weights and computation.
        processor: hub id or folder of the image processor; None for the tower's own. Give the
            host's own if it prepares images in another way.
        seed: of random weights.
        img_size: pixels along the side of the square picture of a DINO tower, a multiple of the
            patch's; None for what the image processor makes.

    Raises:
        ValueError: for other towers, image processors that make images of several sizes, and sizes
            that the tower does not take.
    """

    def __init__(
        self,
        tower: str | dict[str, Any] = "openai/clip-vit-large-patch14-336",
        layer: int = 9,
        dtype: DType = "float32",
        processor: str | None = None,
        seed: int = 0,
        img_size: int | None = None,
    ) -> None:
        super().__init__(dtype)
        self._seed = seed
        self._config = config = vision_config(tower)
        self._source = find_weights(tower) if isinstance(tower, str) else tower
        self._is_random = isinstance(tower, dict) or tower.startswith("random:")
        self.tower_id = "random" if isinstance(tower, dict) else tower
        self.layer = taps.resolve(layer, config.num_hidden_layers + 1, "hidden_states")
        self.feature_dim = config.hidden_size
        self.patch_size, _ = both(config.patch_size)
        self.num_prefix = prefix_tokens(config)
        self.transform = ProcessorTransform(self._image_processor(processor))
        if img_size is not None:
            self._resize(img_size)
        self.grid_hw = patch_grid(config, self._image_size())

    @property
    def depth(self) -> int:
        return int(self._config.num_hidden_layers)

    def _image_processor(self, processor: str | None) -> Any:
        side, _ = image_size(self._config)
        if processor is None and self._is_random:
            return plain_processor(side)
        try:
            found = AutoImageProcessor.from_pretrained(processor or self._source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no image processor in {processor or self._source!r}: pass"
                " `processor`, the id or folder of the host or tower that has one."
            ) from error
        return square_processor(found, side)

    def _image_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the processor makes; None where all have one."""
        if self._config.model_type not in DINO_TOWERS:
            return None
        examples = (Image.new("RGB", size) for size in ((96, 64), (64, 96)))
        one, other = (self.transform(image).shape[-2:] for image in examples)
        if one != other:
            raise ValueError(
                f"the image processor makes images of several sizes, e.g. {[*one]} and {[*other]}"
                " pixels; pass a `processor` that crops or resizes them to one."
            )
        return one[0], one[1]

    def _resize(self, side: int) -> None:
        """Make square pictures of `side` pixels, by the image processor that makes others."""
        name, known = self.tower_id, self._image_size() or image_size(self._config)
        if known == (side, side):
            return
        if self._config.model_type not in DINO_TOWERS:
            raise ValueError(
                f"img_size={side}, but the tower {name!r} sees {known[0]} pixels and no other size;"
                " leave it out, or pass a DINO tower, or one of timm (local-dir:, hf-hub: or"
                " timm:)."
            )
        self._check_sides((side, side), name)
        assert isinstance(self.transform, ProcessorTransform)
        self.transform = ProcessorTransform(resized(self.transform.processor, side, known))
        if (made := self._image_size()) != (side, side):
            raise ValueError(
                f"img_size={side}, but the image processor of {name!r} makes pictures of {made}"
                " pixels, which are no squares; pass a `processor` that makes squares."
            )

    def _build(self, num_blocks: int) -> nn.Module:
        config = copy.deepcopy(self._config)
        if self._is_random:
            # Draw all blocks, so that the first ones are those of the whole tower.
            tower: Any = random_tower(config, self._seed)
            del look(tower).blocks[num_blocks:]  # type: ignore[attr-defined]
            return cast(nn.Module, tower)
        config.num_hidden_layers = num_blocks
        config.vision_use_head = False  # SigLIP: no pooling head
        with _quiet():  # blocks were cut off on purpose
            tower, info = AutoModel.from_pretrained(
                self._source,
                config=config,
                dtype=self.dtype,
                output_loading_info=True,
                attn_implementation="sdpa",
                key_mapping=_PREFIX if config.model_type in CLIP_TOWERS else _PREFIX_OF_LLAVA,
            )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{self._source!r} lacks {len(missing)} weights of the vision tower, e.g."
                f" {missing[:3]}; pass the id or folder of a {config.model_type}."
            )
        return cast(nn.Module, tower)

    def _view(self, tower: nn.Module) -> taps.Tower:
        return look(tower)

    def _run(self, tower: nn.Module, pixel_values: Tensor) -> None:
        if self._config.model_type == PACKED_TOWER:
            tower(**packed_images(pixel_values, self._config.patch_size))
        else:
            super()._run(tower, pixel_values)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from listing every weight that a cut tower leaves unread."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


class ProcessorTransform:
    """The image transform of a transformers image processor.

    Args:
        processor: an image processor.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixel values [3, H, W] of an RGB image."""
        settings = self._settings(image)
        pixels = self.processor(images=image, return_tensors="pt", **settings)["pixel_values"]
        return torch.as_tensor(pixels[0])

    def _settings(self, image: Image.Image) -> dict[str, Any]:
        """Arguments of the processor for one image."""
        return {}

    def instance_map(self, ids: np.ndarray) -> Tensor:
        """Instance ids [h, w] uint8 through the same geometry: [H, W] int64, 0 outside."""
        image = Image.fromarray(np.repeat(ids[:, :, None], 3, axis=2))
        pixels = self.processor(
            images=image,
            return_tensors="pt",
            do_rescale=False,
            do_normalize=False,
            resample=Image.Resampling.NEAREST,
            **self._settings(image),
        )["pixel_values"][0]
        return torch.as_tensor(pixels)[0].round().long()

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """Pixel values [..., 3, H, W] back to colours in 0..1."""
        mean = pixel_values.new_tensor(self.processor.image_mean)[:, None, None]
        std = pixel_values.new_tensor(self.processor.image_std)[:, None, None]
        return (pixel_values * std + mean).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Settings, for the artifact."""
        names = ["size", "crop_size", "do_resize", "do_center_crop", "do_pad", "do_convert_rgb"]
        names += ["image_mean", "image_std", "rescale_factor", "resample", "image_grid_pinpoints"]
        settings = self.processor.to_dict()
        kept = {n: _plain(settings[n]) for n in names if settings.get(n) is not None}
        return {"image_processor_type": type(self.processor).__name__, **kept}


def _plain(value: Any) -> Any:
    """JSON's own types only."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, str, float)):
        return value
    return int(value)
