"""What a short prompt brings for each of its columns: ids, masks, labels, positions.

L tokens of the caller's prompt, L' of the short one, C coordinates of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocvtp.choices import Positions
from ocvtp.hosts.prompt.columns import (
    gather,
    gather_columns,
    gather_coordinates,
    has_holes,
    layout,
    numbered,
    pads_on_right,
)
from ocvtp.hosts.prompt.packed_rows import Packed, shorten_ends
from ocvtp.pruners.layer_pruner import LayerPruner


@dataclass(frozen=True)
class Lined:
    """A prompt whose columns were dropped.

    Args:
        inputs: everything that belongs to it.
        index: [B, L'] and padding: [B, L'], see `layout`.
        rope_deltas: [B, 1] how far coordinates run ahead of the columns after the prompt; None
            without coordinates.
    """

    inputs: dict[str, Any]
    index: Tensor
    padding: Tensor
    rope_deltas: Tensor | None


def line_up(
    inputs: dict[str, Any],
    keep: Tensor,
    real: Tensor,
    given: Tensor | None,
    coordinates: Tensor | None,
    packed: Packed | None,
    positions: Positions,
    layers: LayerPruner | None,
    pad_id: int,
) -> Lined:
    """Drop columns of everything that has one for each token.

    Rows end where the caller's do. In batches that are padded on the right only, and in packed
    ones, they begin where the caller's do, unless `logits_to_keep` reads their ends.

    Args:
        inputs: without position_ids.
        keep: [B, L] bool, what stays. real: [B, L] bool, False on padding.
        given: [B, L] position ids of the caller. coordinates: [C, B, L].
        packed: see `packing_of`. positions: see `attach`.
        layers: what drops further tokens inside the language model.
        pad_id: of columns that hold nothing.
    """
    looked_at = inputs.get("logits_to_keep")
    labels, inputs = inputs.get("labels"), _with_all_labels(inputs, looked_at)
    from_end = isinstance(looked_at, int) and looked_at > 0
    at_end = packed is None and (from_end or not pads_on_right(real))
    index, padding = layout(keep, real, at_end)
    drops, blank = not keep.equal(real), padding
    if drops:
        inputs = inputs | shorten_ends(inputs, keep, padding)
        if given is None and positions == "original":
            given = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    else:
        blank = torch.zeros_like(padding)  # columns that are not read stay, too
    short = gather(inputs, index, blank, pad_id)
    if labels is not None and labels.shape[1] < keep.shape[1]:
        short["labels"] = short["labels"][:, -labels.shape[1] :]
    numbers, deltas = None, None
    if packed is not None:
        numbers = _number_samples(packed, coordinates, index, padding)
    elif coordinates is not None:
        numbers, deltas = gather_coordinates(coordinates, real, index, padding)
    elif given is not None:
        numbers = gather_columns(given.to(index.device).expand_as(real), index, blank)
    elif (drops or layers is not None) and has_holes(padding):
        numbers = numbered(padding)
    if numbers is not None:
        short["position_ids"] = numbers
    # Without a 2-D mask, transformers takes gaps in position_ids for packed sequences.
    if packed is None and (numbers is not None or bool(padding.any())):
        short.setdefault("attention_mask", (~padding).long())
    return Lined(short, index, padding, deltas)


def _with_all_labels(inputs: dict[str, Any], looked_at: Any) -> dict[str, Any]:
    """The same, with a label for every column where the caller has only those of the last ones.

    Raises:
        ValueError: if there are neither as many labels as columns, nor as `logits_to_keep` says.
    """
    labels, length = inputs.get("labels"), inputs["input_ids"].shape[1]
    if labels is None or labels.shape[1] == length:
        return inputs
    if not (isinstance(looked_at, int) and labels.shape[1] == looked_at < length):
        raise ValueError(
            f"labels are {list(labels.shape)}, input_ids {list(inputs['input_ids'].shape)}; pass"
            " equal shapes, or those of the last logits_to_keep columns."
        )
    return inputs | {"labels": pad(labels, (length - looked_at, 0), value=-100)}


def packing_of(
    packed: Packed | None, is_plain: bool, positions: Positions, layers: LayerPruner | None
) -> Packed | None:
    """How the rows are packed, where their positions are to be made from that.

    Args:
        packed: as the call tells it.
        is_plain: whether positions are plain numbers of columns.
        positions: see `attach`. layers: what drops tokens inside the language model.

    Raises:
        ValueError: for settings under which samples would see each other.
    """
    if packed is None or not packed.has_several:
        return packed if is_plain and positions == "contiguous" else None
    if layers is not None:
        raise ValueError(
            f"{layers.name} drops tokens inside the language model, where packed samples cannot be"
            " told apart; pass one prompt a row and its attention_mask, or use a pruner that acts"
            " before the language model (see `ocvtp list`)."
        )
    if positions == "original" and is_plain:
        raise ValueError(
            "positions='original' leaves gaps in position_ids, by which the samples of packed rows"
            " are told apart; attach with positions='contiguous', or pass one prompt a row and its"
            " attention_mask."
        )
    return packed


def _number_samples(
    packed: Packed, coordinates: Tensor | None, index: Tensor, padding: Tensor
) -> Tensor | None:
    """Position ids by which the short rows are packed, as the caller gave them."""
    numbers = None if packed.numbers is None else packed.renumber(index, padding)
    if coordinates is None:
        return numbers
    planes = gather_columns(coordinates, index, padding)
    return planes if numbers is None else torch.cat([numbers[None], planes])
