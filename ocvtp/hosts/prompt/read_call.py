"""A call before it is shortened: its images encoded, their places found, its prompts read.

L tokens of the caller's prompt, R image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.base import Encoded, Host
from ocvtp.hosts.prompt.checks import check_inputs
from ocvtp.hosts.prompt.packed_rows import Packed, find_samples
from ocvtp.hosts.prompt.read_prompt import Reader
from ocvtp.hosts.prompt.tower_output import asked
from ocvtp.structures import Needs

Encode = Callable[[Host, dict[str, Any], Needs], Encoded]
"""How the images of a call are encoded: by a host, from its image arguments, for these needs."""


@dataclass(frozen=True)
class Seen:
    """A call before it is shortened.

    Args:
        input_ids: [B, L]. mask: [B, L] the caller's, None where all columns count.
        real: [B, L] bool, False on padding.
        images: the image arguments. encoded: what the tower made of them, and the prompt.
        placeholder: [B, L] bool. slots: [R, 2] row and column of every one, image after image.
        packed: how the call tells samples of one row apart; None if rows are single prompts.
    """

    input_ids: Tensor
    mask: Tensor | None
    real: Tensor
    images: dict[str, Any]
    encoded: Encoded
    placeholder: Tensor
    slots: Tensor
    packed: Packed | None = None


def encode_now(host: Host, images: dict[str, Any], needs: Needs) -> Encoded:
    """`host.encode`, which remembers nothing."""
    return host.encode(images, needs)


def look(
    host: Host,
    needs: Needs,
    inputs: dict[str, Any],
    reader: Reader | None = None,
    encode: Encode = encode_now,
    whole: bool = False,
) -> Seen:
    """Encode the images of a call, find their places, and read the prompt.

    Args:
        host: with its hooks installed.
        needs: of the pruner.
        inputs: what the processor returned.
        reader: for pruners that need the prompt.
        encode: what runs the tower, or remembers its output.
        whole: whether all that the tower gives will be handed back.

    Raises:
        ValueError: if the prompt and the images do not fit, or the prompt has no words.
    """
    ids, mask = check_inputs(host, inputs)
    images = {k: inputs[k] for k in host.image_keys if inputs.get(k) is not None}
    extra = asked(inputs, host.model.config.model_type, whole)
    encoded = encode(host, images | extra, needs)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    is_image = ids == host.image_token_id
    placeholder = is_image & real
    slots = _slots(placeholder, encoded, is_image & ~real)
    packed = find_samples(inputs, ids, host.plain_positions_tell)
    places = slots
    if packed is not None:
        rows, columns = slots.unbind(dim=1)
        places = torch.stack([packed.samples[rows, columns], columns], dim=1)
    encoded = host.by_image(encoded, places)
    if reader is not None:
        prompts = ids, real
        if packed is not None:
            prompts = packed.by_sample(ids), packed.by_sample(real)
        own = places[encoded.first_rows(places.device), 0]
        encoded = reader.read(host, encoded, *prompts, own)
    return Seen(ids, mask, real, images, encoded, placeholder, slots, packed)


def _slots(placeholder: Tensor, encoded: Encoded, hidden: Tensor) -> Tensor:
    """[R, 2] row and column of every placeholder, in the order in which images fill them."""
    slots, wanted = placeholder.nonzero(), len(encoded.embeddings)
    if len(slots) < wanted and (count := int(hidden.sum())) == wanted - len(slots):
        raise ValueError(
            f"attention_mask is 0 on {count} of the {wanted} image placeholders, so that parts of"
            " images would not be read; pass a mask that is 1 on all of them, as the processor"
            " makes it: the pruner drops tokens of images."
        )
    if len(slots) != wanted:
        raise ValueError(
            f"the prompt has {len(slots)} image placeholders, but the images give"
            f" {wanted} tokens; make both with one call of the processor."
        )
    return slots
