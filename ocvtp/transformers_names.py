"""What transformers calls things, in every version that is supported.

Arguments, output fields, functions and attributes that differ by version, or that a version may
change without notice, are named here and nowhere else in the package. Importing this file does not
import transformers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TESTED = ("5.17", "5.24")
"""The oldest and the newest minor version that the tests run on."""

_CACHE = ("cache", "past_key_values")  # since 5.24, before it
MERGE_PROCESSORS = "_merge_criteria_processor_list"
"""The method by which generate() puts a caller's processors and criteria among its own."""
_ENCODED_IMAGES = "mm_encoder_outputs"  # since 5.20
_ASKING = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # since 5.24
_TOWER, _ROWS = "image_outputs", "image_hidden_states"  # of outputs: since 5.24, before it


@cache
def warn_if_untested() -> None:
    """Say once that the installed version is newer than those that were tested."""
    installed = version("transformers")
    newest = tuple(map(int, TESTED[1].split(".")))
    if tuple(map(int, installed.split(".")[:2])) > newest:
        warnings.warn(
            f"transformers {installed} is newer than what ocvtp was tested on"
            f" ({TESTED[0]} to {TESTED[1]}); compare answers with the unpruned model's"
            " (pruner 'none' must give the same), or install a version of that range.",
            stacklevel=3,
        )


@cache
def cache_name() -> str:
    """What the installed version calls the KV cache among arguments and outputs."""
    from transformers.masking_utils import create_causal_mask

    return next(name for name in _CACHE if name in signature(create_causal_mask).parameters)


def name_cache(arguments: dict[str, Any], own: str) -> dict[str, Any]:
    """The arguments of a call with its KV cache under one name, whichever the caller used.

    Args:
        arguments: of `forward()` or `generate()`; not changed.
        own: what `cache_name` returns.

    Raises:
        ValueError: if there are two caches.
    """
    for other in _CACHE:
        if other != own and other in arguments:
            arguments = dict(arguments)
            given = arguments.pop(other)
            if given is not None and arguments.get(own) is not None:
                raise ValueError(
                    f"{own} and {other} are two names of the KV cache; pass one of them."
                )
            if given is not None:
                arguments[own] = given
    return arguments


def cache_in(arguments: dict[str, Any]) -> Any:
    """The KV cache among arguments of a model, a language model or a layer; None without one."""
    for name in _CACHE:
        if (found := arguments.get(name)) is not None:
            return found
    return None


def cache_length(arguments: dict[str, Any]) -> int:
    """Tokens in the cache that a call was given."""
    cache = cache_in(arguments)
    return int(cache.get_seq_length()) if cache is not None else 0


def cache_of(output: Any) -> Any:
    """The KV cache in what a model or `generate()` returned; None without one."""
    return cache_in(getattr(output, "__dict__", {}))


def encoded_images(arguments: dict[str, Any]) -> Any:
    """What the vision tower made of the images already, where a caller hands that over."""
    return arguments.get(_ENCODED_IMAGES)


def brings_images(arguments: dict[str, Any]) -> bool:
    """Whether a call has images, or videos, to encode."""
    given = (arguments.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
    return any(given) or bool(encoded_images(arguments))


@cache
def hands_back_towers() -> bool:
    """Whether models hand back what their vision towers gave, not just the rows made of it."""
    from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

    return _TOWER in LlavaCausalLMOutputWithPast.__dataclass_fields__


def asks_tower(kind: str) -> bool:
    """Whether models of a `model_type` ask their tower for hidden states when they are asked."""
    return kind in _ASKING and hands_back_towers()


def with_images(output: Any, read: Callable[[], Any], like: Tensor) -> Any:
    """The output of a model with what it says of the images, where its family says anything.

    Args:
        output: a transformers ModelOutput.
        read: gives what `get_image_features` returns; its `pooler_output` are the rows that the
            language model read, of each image [n, D'], or [T, N, D'] of all tiles.
        like: what the language model read, on its device and in its dtype.
    """
    names = getattr(output, "__dataclass_fields__", {})
    found: dict[str, Any] = {}
    if _TOWER in names:
        found[_TOWER] = read()
    elif _ROWS in names:
        rows = read().pooler_output
        rows = rows if isinstance(rows, Tensor) else torch.cat(list(rows))
        found[_ROWS] = rows.to(like.device, like.dtype)
    return replace(output, **found) if found else output


def causal_mask(config: Any, hidden: Tensor, mask: Tensor | None, cache: Any, layer: int) -> Any:
    """The attention mask of a decoder layer, in the form that its attention kernel wants.

    Args:
        config: of the language model.
        hidden: [B, q, D'], what the layer reads.
        mask: [B, L] bool, False on padding, of the cache's columns and these; None if all count.
        cache: of the call.
        layer: its number.
    """
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=mask,
        position_ids=None,
        layer_idx=layer,
        **{cache_name(): cache},
    )


# Functions and classes in a family's own files, which transformers may move as it likes.


def rotate_heads(attention: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[I, H, R, d] queries or keys of a language model, turned by their positions.

    Args:
        attention: the layer's module, next to which its family keeps the function.
        heads: [I, H, R, d].
        cos: [..., I, R, d], of the positions.
        sin: likewise.
    """
    families = (sys.modules[type(part).__module__] for part in attention.modules())
    for family in families:  # the first, unless another library's wrapper is around the module
        if rotate := getattr(family, "apply_multimodal_rotary_pos_emb", None):
            section = attention.config.rope_parameters["mrope_section"]
            turned: Tensor = rotate(heads, heads, cos, sin, section)[0]
            return turned
        if rotate := getattr(family, "apply_rotary_pos_emb", None):
            turned = rotate(heads, heads, cos, sin)[0]
            return turned
    raise ValueError(
        f"nothing next to {type(attention).__name__} turns its heads by their positions; use a"
        " pruner that acts before the language model (see `ocvtp list`)."
    )


def rotate_patches(
    queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """[P, H, d] queries and keys of Qwen-VL's vision tower, turned by their positions."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb_vision(queries, keys, cos, sin)
    return turned


def known_model_types() -> list[str]:
    """The `model_type` of every family that the installed version has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return list(CONFIG_MAPPING_NAMES)


def qwen_vision_tower() -> Any:
    """The class of Qwen2.5-VL's vision tower."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    return modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel


def qwen_image_size(height: int, width: int, **rule: int) -> tuple[int, int]:
    """Height and width to which Qwen-VL's processor resizes an image.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        rule: `factor`, `min_pixels` and `max_pixels`.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    size: tuple[int, int] = smart_resize(height, width, **rule)
    return size


def count_tiles(size: Any, pinpoints: Any, side: int) -> int:
    """Tiles of an image of LLaVA-NeXT, the base view included.

    Args:
        size: height and width of the image, in pixels.
        pinpoints: the sizes that the model tiles.
        side: of a tile, in pixels.
    """
    from transformers.models.llava_next import modeling_llava_next

    return int(modeling_llava_next.image_size_to_num_patches(size, pinpoints, side))


def tile_grid(size: Any, pinpoints: Any, side: int) -> tuple[int, int]:
    """Rows and columns of those tiles, the base view apart; arguments as of `count_tiles`."""
    from transformers.models.llava_next import modeling_llava_next

    grid: tuple[int, int] = modeling_llava_next.get_anyres_image_grid_shape(size, pinpoints, side)
    return grid


def pack_tiles(
    config: Any, sizes: list[list[int]], tiles: Sequence[Tensor], newline: Tensor
) -> list[Tensor]:
    """Rows [n, C] of images in tiles, as a LLaVA-NeXT or LLaVA-OneVision packs them.

    Args:
        config: of the model, which itself is not needed.
        sizes: heights and widths of the images, in pixels.
        tiles: [tiles, N, C] of each image.
        newline: [C].
    """
    from transformers import LlavaNextModel, LlavaOnevisionModel

    settings: dict[str, Any] = {"image_newline": newline}
    if config.model_type == "llava_next":
        cls, name = LlavaNextModel, "vision_feature_select_strategy"
    else:
        cls, name = LlavaOnevisionModel, "vision_aspect_ratio"
    settings[name] = getattr(config, name)
    # of the model, the method reads the settings alone
    packed, _ = cls.pack_image_features(SimpleNamespace(config=config), tiles, sizes, **settings)
    return list(packed)


def unpad(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, H, W] of an image in tiles, without the rows or columns that only padding fills.

    Args:
        image: to cut.
        size: height and width of the image before it was padded, in pixels.
    """
    from transformers.models.llava_next import modeling_llava_next

    cut: Tensor = modeling_llava_next.unpad_image(image, size)
    return cut


# Vision towers.

CLIP_TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
DINO_TOWERS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
VISION_TOWERS = (*CLIP_TOWERS, *DINO_TOWERS)
"""The `model_type` of the towers that are known here."""
PACKED_TOWER = "siglip2_vision_model"
"""The one that takes patches with the shapes of their images, in place of images."""


def prefix_tokens(config: Any) -> int:
    """Tokens of a tower before the patches: its CLS, then its registers."""
    without_cls = config.model_type in ("siglip_vision_model", PACKED_TOWER)
    return 0 if without_cls else 1 + num_registers(config)


def num_registers(config: Any) -> int:
    """Tokens of a tower that are no part of the image, besides its CLS."""
    return int(getattr(config, "num_register_tokens", 0))


def image_size(config: Any) -> tuple[int, int]:
    """Height and width in pixels of the images that a tower's settings are for."""
    if config.model_type == PACKED_TOWER:  # any shape; a square needs no other positions
        return both(int(config.num_patches**0.5) * int(config.patch_size))
    return both(config.image_size)


def patch_grid(config: Any, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of patches of an image.

    Args:
        config: of a tower.
        size: height and width of the image in pixels; None for what the settings are for.
    """
    (height, width), (rows, columns) = size or image_size(config), both(config.patch_size)
    return height // rows, width // columns


def both(size: int | Iterable[int]) -> tuple[int, int]:
    """Height and width of settings that give one number where they are the same."""
    height, width = size if isinstance(size, Iterable) else (size, size)
    return int(height), int(width)


def dino_blocks(tower: Any) -> tuple[Any, Any]:
    """The module that runs the blocks of a DINO tower one after the other, and these."""
    encoder = tower.encoder if hasattr(tower, "encoder") else tower.model
    return encoder, encoder.layer


def dino_query_key(block: Any) -> tuple[Any, Any]:
    """The modules whose outputs are the queries and the keys of a DINO tower's block."""
    attention = block.attention
    if hasattr(attention, "q_proj"):
        return attention.q_proj, attention.k_proj
    return attention.attention.query, attention.attention.key  # older DINOv2


def hands_on_arguments(block: Any) -> bool:
    """Whether a block of a tower hands the arguments that it is called with to its attention."""
    forward = type(block).forward
    if forward is torch.nn.Module.forward:  # of a wrapper, e.g. torch.compile's
        return True
    return any(p.kind is p.VAR_KEYWORD for p in signature(forward).parameters.values())


def packed_images(pixel_values: Tensor, patch_size: int) -> dict[str, Tensor]:
    """What a `Siglip2VisionModel` takes of images of one size.

    Args:
        pixel_values: [B, 3, H, W].
        patch_size: side of a patch.
    """
    batch, _, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    cut = pixel_values.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))
    patches = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, N, P P 3]
    shape = torch.tensor([[rows, columns]], device=patches.device)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones_like(patches[:, :, 0], dtype=torch.long),
        "spatial_shapes": shape.expand(batch, -1),
    }


def is_checkpointed(block: Any) -> bool:
    """Whether a block of a tower or a language model will run again in the backward pass."""
    runs_again = getattr(block, "gradient_checkpointing", False) and block.training
    return bool(runs_again and torch.is_grad_enabled())


# The attention of a language model, and its checkpointing.

GATED = "ocvtp_gated"
"""What the attention is called through which gates act."""


def attention_of(model: Any) -> str:
    """The attention that a language model runs."""
    return str(model.config._attn_implementation)


def sdpa_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """What transformers runs for `sdpa`; its output is [B, L, H, d]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: tuple[Tensor, None] = sdpa_attention_forward(*args, **kwargs)
    return found


@cache
def register_attention(function: Callable[..., Any]) -> None:
    """Make an attention known as `GATED`, with the masks of `sdpa`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(GATED, function)
    AttentionMaskInterface.register(GATED, sdpa_mask)


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Inside the block, a language model runs another attention; see `attention_of`.

    Raises:
        ValueError: if it cannot.
    """
    own = attention_of(model)
    if own == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        if attention_of(model) != name:
            raise ValueError(
                f"the attention of {type(model).__name__} cannot be replaced, so that no gate can"
                " act in it; use a gate that acts before the language model (noise, scale, gather)."
            )
        yield
    finally:
        model.set_attn_implementation(own)


_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")


@contextmanager
def checkpointed_layers(model: Any) -> Iterator[None]:
    """Inside the block, layers run again in the backward pass, and are else as in evaluation.

    Args:
        model: a language model. Its layers run again through the attention of their first run.

    Raises:
        ValueError: for layers that cannot.
    """
    layers = [*model.layers]
    if unable := [layer for layer in layers if not hasattr(layer, _CHECKPOINTING[0])]:
        raise ValueError(
            f"{type(unable[0]).__name__} cannot run again in the backward pass; leave checkpointing"
            " out."
        )

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), attending(model, attention_of(model))

    again = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    before = [{name: vars(layer).get(name) for name in _CHECKPOINTING} for layer in layers]
    try:
        for layer in layers:
            for name, value in zip(_CHECKPOINTING, (True, again, True), strict=True):
                setattr(layer, name, value)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            for name, value in own.items():
                if value is None:
                    vars(layer).pop(name, None)
                else:
                    setattr(layer, name, value)
