"""What an artifact says of the model whose visual tokens a scorer reads, and whether this is it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.base import Host
from ocvtp.pruners import Compose, Pruner
from ocvtp.selectors.scorer import Widths

_SAMPLED = 16  # values of each weight
_SHOWN = 12  # digits of a hash


def origin_of(host: Host, name: str) -> dict[str, Any]:
    """Fields of `ocvtp.selectors.network.SelectorConfig`: widths, host, tower, grid.

    Args:
        host: of the model, which may be without numbers.
        name: of the model: a folder, or a hub id.
    """
    config = host.model.config
    vision, text = getattr(config, "vision_config", None), config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    # Qwen2-VL calls the width of the language model `hidden_size` there.
    tower = getattr(vision, "embed_dim", 0) or getattr(vision, "hidden_size", 0)
    return {
        "widths": Widths(text.hidden_size, tower, heads),
        "host": {
            "model": name,
            "model_type": config.model_type,
            "width": text.hidden_size,
            "num_layers": len(host.language_model.layers),
            "content_hash": content_hash(host),
        },
        "tower": name,
        "grid_hw": host.grid_hw or (1, host.usual_tokens or 1),
    }


@torch.no_grad()
def content_hash(host: Host) -> str | None:
    """sha256 of the names and shapes of a model's weights, and of a few values of each.

    It is the same in fp32, bf16, and the precision that the weights are stored in; a training of
    any of them changes it. It takes milliseconds at any size.

    Returns:
        None where not all weights are at hand: without numbers, or in parts on several machines.
    """
    digest, sampled = hashlib.sha256(), list[Tensor]()
    for name, weight in sorted(host.model.named_parameters()):
        values = weight.data
        if values.is_meta or not values.numel() or type(values) is not Tensor:
            return None
        digest.update(f"{name} {list(values.shape)}\n".encode())
        some = values.reshape(-1)[:: max(1, values.numel() // _SAMPLED)][:_SAMPLED]
        sampled.append(some.to("cpu", torch.bfloat16))
    digest.update(torch.cat(sampled).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def check_origin(host: Host, pruner: Pruner | Compose) -> None:
    """Refuse a pruner that was trained in a model of another width or of other layers.

    Raises:
        ValueError: that says what was trained, and what this is.
    """
    width = host.model.config.get_text_config().hidden_size
    check_trained_in(pruner, width, len(host.language_model.layers))


def check_trained_in(pruner: Pruner | Compose, width: int, num_layers: int) -> None:
    """Refuse a pruner that was trained in a language model of another width or of other layers.

    Raises:
        ValueError: that says what was trained, and what this is.
    """
    own = {"width": width, "num_layers": num_layers}
    for part in pruner.parts:
        trained = part.trained_in
        if any(trained.get(name) not in (None, own[name]) for name in own):
            raise ValueError(
                f"pruner {part.name!r} was trained in a language model of"
                f" {trained.get('num_layers')} layers, {trained.get('width')} wide, and this one"
                f" has {num_layers}, {width} wide; pass a checkpoint that was trained in this"
                " model."
            )


def other_weights(host: Host, pruner: Pruner | Compose) -> str | None:
    """What to say where a pruner was trained in a model of other weights; None if it was not."""
    for part in pruner.parts:
        trained = part.trained_in.get("content_hash")
        if trained is None or (own := content_hash(host)) in (None, trained):
            continue
        return (
            f"pruner {part.name!r} was trained in {part.trained_in.get('model')}, whose weights"
            f" have the hash {trained[:_SHOWN]}, and those of this model have {str(own)[:_SHOWN]};"
            " it may choose worse here than it was measured, so pass a checkpoint that was trained"
            " in this model."
        )
    return None
