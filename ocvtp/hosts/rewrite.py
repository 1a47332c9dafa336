"""Shorten a prompt: the processor's tensors in, the same without the dropped tokens out.

B rows of the batch, L tokens of the caller's prompt, L' of the short one, R image tokens, D' width
of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ocvtp.hosts.base import Encoded, Host, Kept
from ocvtp.hosts.columns import gather, gather_coordinates, layout
from ocvtp.hosts.reading import Reader
from ocvtp.pruners import Pruner
from ocvtp.structures import Needs, Selection

Positions = Literal["contiguous", "original"]


@dataclass(frozen=True)
class Prompt:
    """One shortened prompt.

    Args:
        input_ids: [B, L] the caller's.
        keep: [B, L] bool, which of them the language model reads.
        short_ids: [B, L'].
        short_mask: [B, L'] bool, False on padding.
        embeddings: [B, L', D'] of the short prompt, images included.
        positions: [B, L'] its position ids where they have gaps, [1 + C, B, L'] where tokens have
            coordinates (see `Host.rope_positions`), else None.
        rope_deltas: [B, 1] how far coordinates run ahead of the columns behind the prompt; None
            without coordinates.
        images: the image arguments. encoded: what the tower made of them. selection: what was kept.
    """

    input_ids: Tensor
    keep: Tensor
    short_ids: Tensor
    short_mask: Tensor
    embeddings: Tensor
    positions: Tensor | None
    rope_deltas: Tensor | None
    images: dict[str, Any]
    encoded: Encoded
    selection: Selection

    @property
    def length(self) -> int:
        """L."""
        return self.input_ids.shape[1]

    @property
    def short_length(self) -> int:
        """L'."""
        return self.short_ids.shape[1]

    def summary(self) -> dict[str, Any]:
        """Counts worth showing (this waits for the device)."""
        return {
            "visual_tokens": self.encoded.tokens.real.sum(dim=1).tolist(),
            "visual_tokens_kept": self.selection.counts().tolist(),
            "prompt_tokens": self.length,
            "prompt_tokens_kept": self.keep.sum(dim=1).tolist(),
        }


@dataclass(frozen=True)
class Seen:
    """A call before it is shortened.

    Args:
        input_ids: [B, L]. mask: [B, L] the caller's, None where all columns count.
        real: [B, L] bool, False on padding.
        images: the image arguments. encoded: what the tower made of them, and the prompt beside it.
        placeholder: [B, L] bool. slots: [R, 2] row and column of every one, image after image.
    """

    input_ids: Tensor
    mask: Tensor | None
    real: Tensor
    images: dict[str, Any]
    encoded: Encoded
    placeholder: Tensor
    slots: Tensor


def shorten(
    host: Host,
    pruner: Pruner,
    inputs: dict[str, Any],
    positions: Positions = "contiguous",
    reader: Reader | None = None,
) -> tuple[dict[str, Any], Prompt]:
    """Encode the images, let the pruner choose, and drop the other placeholders from the prompt.

    Args:
        host: of the model.
        pruner: with its hooks installed.
        inputs: what the processor returned (and `labels`, `position_ids` if wanted).
        positions: `contiguous` numbers what is left from 0; `original` leaves the gaps. Where
            tokens have coordinates, they always keep them.
        reader: of the prompt, for pruners that need it.

    Returns:
        the inputs without image arguments, shortened, and the prompt with its embeddings.

    Raises:
        ValueError: if the prompt and the images do not fit, or for inputs that cannot be shortened.
    """
    seen = look(host, pruner.needs, inputs, reader)
    ids, real, encoded = seen.input_ids, seen.real, seen.encoded
    inputs = {k: v for k, v in inputs.items() if k not in seen.images}
    inputs |= {"input_ids": ids, "attention_mask": seen.mask}
    coordinates = host.rope_positions(inputs, seen.images)
    if coordinates is not None:
        inputs["position_ids"] = coordinates
    selection = pruner.select(encoded.tokens)
    _check_selection(pruner, encoded, selection)
    if positions == "original" or inputs.get("position_ids") is not None:
        selection = selection.in_raster_order()  # every row has the position of its place
    kept = host.apply(encoded, selection)
    keep = real & ~seen.placeholder
    keep[seen.slots[kept.positions.to(seen.slots.device)].unbind(dim=1)] = True

    index, padding = layout(keep, real)
    if positions == "original" and inputs.get("position_ids") is None and not keep.equal(real):
        inputs["position_ids"] = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    short = gather(inputs, index, padding, _pad_id(host, ids, real))
    deltas = None
    if coordinates is not None:
        places = gather_coordinates(coordinates, real, index, padding)
        short["position_ids"], deltas = places
    short_ids, numbers = short["input_ids"], short.get("position_ids")
    embeddings = _embed(host, short_ids, seen.placeholder.gather(1, index) & ~padding, kept)
    return short, Prompt(
        input_ids=ids,
        keep=keep,
        short_ids=short_ids,
        short_mask=~padding,
        embeddings=embeddings,
        positions=numbers,
        rope_deltas=deltas,
        images=seen.images,
        encoded=encoded,
        selection=selection,
    )


def look(host: Host, needs: Needs, inputs: dict[str, Any], reader: Reader | None = None) -> Seen:
    """Encode the images of a call, find their places, and read the prompt.

    Args:
        host: with its hooks installed.
        needs: of the pruner.
        inputs: what the processor returned.
        reader: for pruners that need the prompt.

    Raises:
        ValueError: if the prompt and the images do not fit, or the prompt says nothing.
    """
    ids, mask = _check(host, inputs)
    images = {k: inputs[k] for k in host.image_keys if inputs.get(k) is not None}
    encoded = host.encode(images, needs)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    placeholder = (ids == host.image_token_id) & real
    slots = _slots(placeholder, encoded)
    if reader is not None:
        rows = slots[encoded.first_rows(slots.device), 0]
        encoded = reader.read(host, encoded, ids, real, rows)
    return Seen(ids, mask, real, images, encoded, placeholder, slots)


def _slots(placeholder: Tensor, encoded: Encoded) -> Tensor:
    """[R, 2] row and column of every placeholder, in the order in which images fill them."""
    slots = placeholder.nonzero()
    if len(slots) != len(encoded.embeddings):
        raise ValueError(
            f"the prompt has {len(slots)} image placeholders, but the images give"
            f" {len(encoded.embeddings)} tokens; make both with one call of the processor."
        )
    return slots


def _embed(host: Host, short_ids: Tensor, image_tokens: Tensor, kept: Kept) -> Tensor:
    """[B, L', D'] the embeddings of the text, and the kept rows where `image_tokens` is True."""
    text: Tensor = host.model.get_input_embeddings()(short_ids)
    rows = kept.embeddings.to(text.device, text.dtype)
    return text.masked_scatter(image_tokens[:, :, None].to(text.device), rows)


def _check(host: Host, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The prompt's ids and mask on the embedding's device."""
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


def check_mask(mask: Tensor, ids: Tensor) -> None:
    """Refuse other masks than the processor's.

    Raises:
        ValueError: if the mask is not 2-D, or not of the shape of the ids.
    """
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
    if inputs.get("mm_encoder_outputs"):
        raise ValueError(
            "mm_encoder_outputs hold images that were encoded already; pass pixel_values, so that"
            " the pruner sees them."
        )


def _check_selection(pruner: Pruner, encoded: Encoded, selection: Selection) -> None:
    """Anything but ascending indices would silently mix up tokens, or images."""
    keep, valid = selection.keep_indices, selection.valid
    images, num_tokens = encoded.tokens.batch_size, encoded.tokens.num_tokens
    if valid is None:
        valid = torch.ones_like(keep, dtype=torch.bool)
    fits = (keep >= 0) & (keep < num_tokens) | ~valid
    if encoded.tokens.valid is not None:
        real = encoded.tokens.valid.to(keep.device)
        fits &= real.gather(1, keep.clamp(0, num_tokens - 1)) | ~valid
    fits[:, 1:] &= (keep.diff(dim=1) > 0) & valid[:, :-1] | ~valid[:, 1:]
    if len(keep) != images or not bool(fits.all()):
        raise ValueError(
            f"pruner {pruner.name!r} returned keep_indices {keep.tolist()}; for each of {images}"
            f" images, return unique ascending numbers below {num_tokens} (of real tokens, where"
            " images differ in size), the valid ones first."
        )


def _pad_id(host: Host, ids: Tensor, real: Tensor) -> int:
    """What the caller pads with, else what the model does."""
    if not bool(real.all()):
        return int(ids[~real][0])
    text_config = host.model.config.get_text_config()
    for source in (getattr(host.model, "generation_config", None), text_config):
        pad = getattr(source, "pad_token_id", None)
        if isinstance(pad, int):
            return pad
    return 0
