"""What a call must bring, and what a pruner must answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.base import Host
from ocvtp.pruners import Compose, Pruner
from ocvtp.structures import Selection, VisualTokens
from ocvtp.transformers_names import encoded_images

USE_GENERATE = (
    "If you called generate() of the class: it passes the pruner by; call model.generate(...), or"
    " model.generate.__wrapped__(model, ...) to record gradients."
)


def check_inputs(host: Host, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The prompt's ids and mask on the embedding's device.

    Raises:
        ValueError: for inputs that cannot be shortened.
    """
    if inputs.get("inputs_embeds") is not None or inputs.get("input_ids") is None:
        raise ValueError(
            "pruning finds image placeholders in input_ids; pass input_ids and pixel_values and"
            " leave inputs_embeds out."
        )
    _refuse_other_images(inputs)
    device = host.model.get_input_embeddings().weight.device
    ids: Tensor = inputs["input_ids"]
    ids = ids if device.type == "meta" else ids.to(device)
    mask = inputs.get("attention_mask")
    if mask is None:
        return ids, None
    check_mask(mask, ids)
    return ids, mask.to(ids.device)


def check_mask(mask: Any, ids: Tensor) -> None:
    """Refuse other masks than the processor's.

    Raises:
        ValueError: if the mask is no 2-D tensor, or not of the shape of the ids.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}, made for the caller's columns; pass the"
            " 2-D tensor that the processor makes."
        )
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {mask.ndim} dimensions; pass the 2-D one that the processor makes."
        )
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}; pass equal shapes."
        )


def _refuse_other_images(inputs: dict[str, Any]) -> None:
    """Refuse images that are no `pixel_values`.

    Raises:
        ValueError: for videos, and for images that were encoded beforehand.
    """
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError("videos are not pruned; call the model without the pruner for them.")
    if encoded_images(inputs):
        raise ValueError(
            "mm_encoder_outputs hold images that were encoded already; pass pixel_values, so that"
            f" the pruner sees them. {USE_GENERATE} If this model drafts for another"
            " (assistant_model=), attach a pruner to that one too, or none to this one."
        )


def beyond_all(host: Host, pruner: Pruner | Compose) -> str | None:
    """Why a pruner drops nothing of any image of a model; None if it may, or if images differ."""
    return None if host.image_tokens is None else beyond(host.image_tokens, pruner)


def beyond(
    count: int, pruner: Pruner | Compose, whose: str = "every image of this model has"
) -> str | None:
    """The same where images have `count` visual tokens. whose: which images these are."""
    for part in pruner.parts:
        if part.exact and part.exceeds(count):
            return (
                f"num_keep={part.num_keep} exceeds the {count} visual tokens that {whose}, so that"
                f" {part.name!r} drops none; pass at most {count}."
            )
    return None


def refuse_beyond_all(host: Host, pruner: Pruner | Compose) -> None:
    """For commands: their results would be the unpruned model's, under the pruner's name.

    Raises:
        ValueError: if the pruner drops nothing of any image.
    """
    if why := beyond_all(host, pruner):
        raise ValueError(why)


def refuse_beyond_context(
    host: Host, ids: Tensor, new: int = 0, *, without_images: bool = False
) -> None:
    """For commands: beyond its positions, a language model says anything, and slowly.

    Args:
        host: of the model.
        ids: [B, L] of the prompt.
        new: tokens of the answer, at most.
        without_images: whether their tokens do not count, as a pruner may drop them.

    Raises:
        ValueError: if the prompt and the answer are longer than the model can read.
    """
    most = getattr(host.model.config.get_text_config(), "max_position_embeddings", None)
    of_images = int((ids[0] == host.image_token_id).sum())
    length = ids.shape[1] - (of_images if without_images else 0)
    if most is None or length + new <= most:
        return
    images = f"besides {of_images}" if without_images else f"{of_images} of them"
    answer = f" and an answer of {new}" if new else ""
    shorter = ", or pass a smaller max_new_tokens" if new else ""
    raise ValueError(
        f"a prompt of {length} tokens ({images} of images){answer} does not fit into the {most}"
        f" positions of the language model; shorten the prompt{shorter}."
    )


def check_selection(pruner: Pruner, tokens: VisualTokens, selection: Selection) -> None:
    """Refuse all but ascending indices: others would silently mix up tokens, or images.

    Raises:
        ValueError: for such indices.
    """
    keep, valid = selection.keep_indices, selection.valid
    images, num_tokens = tokens.batch_size, tokens.num_tokens
    if valid is None:
        valid = torch.ones_like(keep, dtype=torch.bool)
    fits = (keep >= 0) & (keep < num_tokens) | ~valid
    if tokens.valid is not None:
        real = tokens.valid.to(keep.device)
        fits &= real.gather(1, keep.clamp(0, num_tokens - 1)) | ~valid
    fits[:, 1:] &= (keep.diff(dim=1) > 0) & valid[:, :-1] | ~valid[:, 1:]
    if len(keep) != images or not bool(fits.all()):
        raise ValueError(
            f"pruner {pruner.name!r} returned keep_indices {keep.tolist()}; for each of {images}"
            f" images, return unique ascending numbers below {num_tokens} (of real tokens, where"
            " images differ in size), the valid ones first."
        )
