"""Widths and depths of a vision-language model, as far as operations depend on them.

N visual tokens of a view (an image, or a tile of one), D width of the tower, D' of the language
model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_CLIP_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}
_CLIP_FAMILIES = ("llava", "llava_next")
_QWEN_FAMILIES = ("qwen2_5_vl",)


@dataclass(frozen=True)
class TextSizes:
    """A language model of gated MLPs.

    Args:
        layers: L. width: D'. ffn: of the MLP.
        query_width: of all query heads together, and of what attention gives.
        key_width: of all key heads together, and of all value heads; `query_width` without
            grouped-query attention.
        key_heads: of `key_width`.
        vocabulary: rows of `lm_head`.
    """

    layers: int
    width: int
    ffn: int
    query_width: int
    key_width: int
    key_heads: int
    vocabulary: int


@dataclass(frozen=True)
class ClipSizes:
    """A CLIP or SigLIP tower, and the two-layer projector of LLaVA behind it.

    Args:
        blocks: of the tower. width: D. ffn: of its MLPs. heads: of its attention.
        patch_inputs: numbers of a patch's pixels. grid_hw: patches of a view, N.
        prefix: tokens in front of them: 1 with a CLS.
        layers_read: of `hidden_states`, that go to the projector side by side.
        shared_width: of CLIP's space for images and texts; 0 without one.
    """

    blocks: int
    width: int
    ffn: int
    heads: int
    patch_inputs: int
    grid_hw: tuple[int, int]
    prefix: int
    layers_read: tuple[int, ...]
    shared_width: int

    @property
    def view_tokens(self) -> int:
        """N."""
        return math.prod(self.grid_hw)


@dataclass(frozen=True)
class QwenSizes:
    """The tower of Qwen2.5-VL, most of whose blocks attend inside windows, and its merger.

    Args:
        blocks, width, ffn, heads, patch_inputs: see `ClipSizes`; MLPs are gated.
        unit: patches along the side of a visual token.
        window: visual tokens along the side of a window.
        whole: blocks that attend to the whole image.
    """

    blocks: int
    width: int
    ffn: int
    heads: int
    patch_inputs: int
    unit: int
    window: int
    whole: frozenset[int]


@dataclass(frozen=True)
class Sizes:
    """A vision-language model.

    Args:
        text: the language model. tower: the vision tower, with what projects its tokens.
        usual_tokens: N of an image where nobody says it: LLaVA-NeXT's of a square of two tiles by
            two, Qwen2.5-VL's of 672 pixels.
    """

    text: TextSizes
    tower: ClipSizes | QwenSizes
    usual_tokens: int


def sizes_of(model: Any) -> Sizes:
    """The sizes of a transformers model or configuration.

    Raises:
        ValueError: for a family whose operations are not known here.
    """
    config = getattr(model, "config", model)
    kind = getattr(config, "model_type", None)
    if kind in _QWEN_FAMILIES:
        return Sizes(_text(config), _qwen(config), usual_tokens=576)
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    if kind in _CLIP_FAMILIES and tower in _CLIP_TOWERS:
        clip = _clip(config)
        views = 5 if kind == "llava_next" else 1
        return Sizes(_text(config), clip, views * clip.view_tokens)
    raise ValueError(
        f"operations of model_type={kind!r} with a tower of {tower!r} are not known; pass a"
        f" configuration or model of {', '.join((*_CLIP_FAMILIES, *_QWEN_FAMILIES))} with a tower"
        f" of {' or '.join(_CLIP_TOWERS)}, or Qwen's own."
    )


def _text(config: Any) -> TextSizes:
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return TextSizes(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        ffn=text.intermediate_size,
        query_width=head * text.num_attention_heads,
        key_width=head * text.num_key_value_heads,
        key_heads=text.num_key_value_heads,
        vocabulary=text.vocab_size,
    )


def _clip(config: Any) -> ClipSizes:
    vision, chosen = config.vision_config, config.vision_feature_layer
    side = vision.image_size // vision.patch_size
    count = vision.num_hidden_layers + 1
    return ClipSizes(
        blocks=vision.num_hidden_layers,
        width=vision.hidden_size,
        ffn=vision.intermediate_size,
        heads=vision.num_attention_heads,
        patch_inputs=vision.num_channels * vision.patch_size**2,
        grid_hw=(side, side),
        prefix=_CLIP_TOWERS[vision.model_type],
        layers_read=tuple(
            number % count for number in ([chosen] if isinstance(chosen, int) else chosen)
        ),
        shared_width=getattr(vision, "projection_dim", 0),
    )


def _qwen(config: Any) -> QwenSizes:
    vision = config.vision_config
    return QwenSizes(
        blocks=vision.depth,
        width=vision.hidden_size,
        ffn=vision.intermediate_size,
        heads=vision.num_heads,
        patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        unit=vision.spatial_merge_size,
        window=vision.window_size // vision.patch_size // vision.spatial_merge_size,
        whole=frozenset(vision.fullatt_block_indexes),
    )
