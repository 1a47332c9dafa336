"""Widths and depths of a vision-language model, as far as operations depend on them.

They are read from the model itself, which its host knows. From a configuration a model is built
without memory, so that a new family needs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ocvtp.hosts.base import Host
from ocvtp.hosts.registry import host_class, hosts


@dataclass(frozen=True)
class TextSizes:
    """A language model of gated MLPs.

    Args:
        layers: L. width: D'. ffn: of the MLP.
        heads: of queries.
        query_width: of all query heads together, and of what attention gives.
        key_width: of all key heads together, and of all value heads; `query_width` without
            grouped-query attention.
        key_heads: of `key_width`.
        vocabulary: rows of `lm_head`.
    """

    layers: int
    width: int
    ffn: int
    heads: int
    query_width: int
    key_width: int
    key_heads: int
    vocabulary: int


@dataclass(frozen=True)
class TowerSizes:
    """A vision tower, and what projects its tokens.

    Args:
        blocks: of each block, weights of its matrices without its MLP, and of its MLP.
        width: D. heads: of its attention. patch_inputs: numbers of a patch's pixels.
        projector: weights of the matrices that every row of the language model goes through.
        features: width of what pruners see as `features`.
        layers_read: of `hidden_states`, that go to the projector side by side.
        shared_width: of CLIP's space for images and texts; 0 without one.
    """

    blocks: tuple[tuple[int, int], ...]
    width: int
    heads: int
    patch_inputs: int
    projector: int
    features: int
    layers_read: tuple[int, ...]
    shared_width: int


@dataclass(frozen=True)
class Sizes:
    """A vision-language model.

    Args:
        host: of a model without memory.
        text: the language model. tower: the vision tower, with what projects its tokens.
        usual_tokens: visual tokens of an image of no given size, see `Host.usual_tokens`.
    """

    host: Host
    text: TextSizes
    tower: TowerSizes
    usual_tokens: int


def sizes_of(model: Any) -> Sizes:
    """The sizes of a transformers model or configuration; sizes are returned as they are.

    Raises:
        ValueError: for a family whose operations are not counted, and for a language model of other
            layers than are known.
    """
    if isinstance(model, Sizes):
        return model
    config = getattr(model, "config", model)
    kind = getattr(config, "model_type", None)
    family = host_class(kind)
    if family is None or not family.counts_operations:
        counted = [host for host in hosts().values() if host.counts_operations]
        known = sorted(name for host in counted for name in host.model_types)
        raise ValueError(
            f"operations of model_type={kind!r} are not counted; pass a configuration or model of"
            f" {', '.join(known)}."
        )
    host = family(_empty(config))
    if host.usual_tokens is None:
        raise ValueError(
            f"{type(host).__name__} counts operations and does not say the `usual_tokens` of an"
            " image; mend it."
        )
    text = _text(config)
    _refuse_other_layers(host, text)
    return Sizes(host, text, _tower(host, text.width), host.usual_tokens)


def _empty(config: Any) -> Any:
    """A model of a configuration, without numbers."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(
            deepcopy(config), attn_implementation="eager"
        )


def _text(config: Any) -> TextSizes:
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return TextSizes(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        ffn=text.intermediate_size,
        heads=text.num_attention_heads,
        query_width=head * text.num_attention_heads,
        key_width=head * text.num_key_value_heads,
        key_heads=text.num_key_value_heads,
        vocabulary=text.vocab_size,
    )


def _refuse_other_layers(host: Host, text: TextSizes) -> None:
    """Refuse a language model whose layers are no attention and gated MLP, e.g. one of experts."""
    projections = 2 * text.width * (text.query_width + text.key_width)
    known = projections + 3 * text.width * text.ffn
    if any(_weights(layer) != known for layer in host.language_model.layers):
        kind = host.language_model.config.model_type
        raise ValueError(
            f"operations of a language model of model_type={kind!r} are not counted, whose layers"
            " have other matrices than attention and a gated MLP; pass a model whose layers have"
            " these alone."
        )


def _tower(host: Host, text_width: int) -> TowerSizes:
    parts = host.tower_parts()
    patches = next(m for m in _matrices(host.tower) if not isinstance(m, nn.Linear))
    into = next(m for m in _matrices(host.projectors[0]) if isinstance(m, nn.Linear))
    return TowerSizes(
        blocks=tuple((_weights(b) - _weights(b.mlp), _weights(b.mlp)) for b in parts.blocks),
        width=patches.out_channels,
        heads=parts.num_heads,
        patch_inputs=patches.weight[0].numel(),
        projector=sum(map(_weights, host.projectors)),
        features=text_width if host.features_are_projected else into.in_features,
        layers_read=tuple(map(parts.layer, host.layers_read({}))),
        shared_width=getattr(host.tower.config, "projection_dim", 0),
    )


def _matrices(module: nn.Module) -> Iterator[Any]:
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return (part for part in module.modules() if isinstance(part, kinds))


def _weights(module: Any) -> int:
    """Of a module's matrices: half the operations of a row that goes through all of them."""
    return sum(matrix.weight.numel() for matrix in _matrices(module))
