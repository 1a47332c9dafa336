"""Shorten a prompt: from the processor's tensors to the same without the dropped tokens.

L tokens of the caller's prompt, L' of the short one, R image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ocvtp.choices import Positions
from ocvtp.hosts.base import Encoded, Host, Kept
from ocvtp.hosts.in_llm.deepstack import Deepstack
from ocvtp.hosts.in_llm.plan import LayerPlan, plan_layers
from ocvtp.hosts.prompt.checks import check_selection
from ocvtp.hosts.prompt.line_up import line_up, packing_of
from ocvtp.hosts.prompt.read_call import Seen
from ocvtp.hosts.prompt.select import Select, select, select_shares
from ocvtp.hosts.prompt.tower_output import of_kept
from ocvtp.ops.merging import keep_all
from ocvtp.pruners import Pruner
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.structures import Needs, Selection, Stage, take


@dataclass(frozen=True)
class Prompt:
    """One shortened prompt.

    Args:
        input_ids: [B, L] the caller's.
        keep: [B, L] bool, which of them the language model reads.
        columns: [B, L'] which of the caller's columns each is, -1 on padding.
        short_ids: [B, L'].
        short_mask: [B, L'] bool, False on padding.
        embeddings: [B, L', D'] of the short prompt, images included.
        positions: [B, L'] its position ids where they have gaps, [1 + C, B, L'] where tokens have
            coordinates (see `Host.rope_positions`), else None.
        rope_deltas: [B, 1] how far coordinates run ahead of the columns after the prompt; None
            without coordinates.
        images: the image arguments. encoded: what the tower made of them. selection: what was kept.
        deepstack: what the language model adds to its hidden states; None if it adds nothing.
        layers: what will be dropped inside the language model.
    """

    input_ids: Tensor
    keep: Tensor
    columns: Tensor
    short_ids: Tensor
    short_mask: Tensor
    embeddings: Tensor
    positions: Tensor | None
    rope_deltas: Tensor | None
    images: dict[str, Any]
    encoded: Encoded
    selection: Selection
    deepstack: Deepstack | None = None
    layers: LayerPlan | None = None

    @property
    def length(self) -> int:
        """L, columns of the caller's prompt."""
        return self.input_ids.shape[1]

    @property
    def short_length(self) -> int:
        """L', columns of the short prompt."""
        return self.short_ids.shape[1]

    def shorten(self, values: Tensor, fill: int | float | bool = 0) -> Tensor:
        """[B, L] values of the caller's columns, e.g. labels, for the short prompt's: [B, L'].

        Args:
            values: of every column of the caller's.
            fill: what padding gets, e.g. -100 in labels.
        """
        columns = self.columns.to(values.device)
        return values.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, fill)

    def lengthen(self, values: Tensor) -> Tensor:
        """[B, L', ...] values of the short prompt's columns, e.g. logits, for the caller's: [B, L].

        A column that was dropped gets those of the last one before it that was not: the
        next token is predicted from there.
        """
        columns = self.columns.to(values.device)
        here = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        if self.length == self.short_length and bool(((columns == here) | (columns < 0)).all()):
            return values
        places = torch.zeros_like(self.input_ids, device=columns.device)
        is_read = columns >= 0
        places = places.scatter_reduce(1, columns.clamp(min=0), (here + 1) * is_read, "amax")
        return take(values, (places.cummax(dim=1).values - 1).clamp(min=0))

    def summary(self) -> dict[str, Any]:
        """Counts worth showing (this waits for the device)."""
        return {
            "visual_tokens": self.encoded.counts().tolist(),
            "visual_tokens_encoded": self.encoded.tokens.real.sum(dim=1).tolist(),
            "visual_tokens_kept": self.selection.counts().tolist(),
            "prompt_tokens": self.length,
            "prompt_tokens_kept": self.keep.sum(dim=1).tolist(),
            "layers": [] if self.layers is None else self.layers.summary(),
        }


@dataclass(frozen=True)
class Shortened:
    """A call whose prompt was shortened.

    Args:
        inputs: without image arguments.
        prompt: with its embeddings.
        tower: what `get_image_features` returned, see `tower_output.known`. kept: of its rows.
    """

    inputs: dict[str, Any]
    prompt: Prompt
    tower: Any
    kept: Kept

    def images(self) -> Any:
        """What the model hands back of its images: the tower's output with the rows it read."""
        return of_kept(self.tower, self.kept, len(self.prompt.encoded.embeddings))


def shorten(
    host: Host,
    pruner: Pruner | None,
    inputs: dict[str, Any],
    seen: Seen,
    positions: Positions = "contiguous",
    layers: LayerPruner | None = None,
    run: Select = select,
    of_rows: Sequence[Mapping[Stage, Pruner]] | None = None,
) -> Shortened:
    """Let the pruner choose, and drop the other placeholders from the prompt.

    Args:
        host: of the model.
        pruner: with its hooks installed; None keeps all tokens.
        inputs: what the processor returned (and `labels`, `position_ids` if wanted).
        seen: what `look` found in them.
        positions: `contiguous` numbers what is left from 0; `original` leaves the gaps. Where
            tokens have coordinates, they always keep them.
        layers: what drops further tokens inside the language model.
        run: what runs `pruner.select`.
        of_rows: [B] `pruner` and `layers` by their stages, with the budget of each row; None where
            all have that of these two.

    Returns:
        the inputs without image arguments, shortened, and the prompt with its embeddings.

    Raises:
        ValueError: if the prompt and the images do not fit, or for inputs that cannot be shortened.
    """
    ids, real, encoded = seen.input_ids, seen.real, seen.encoded
    inputs = {k: v for k, v in inputs.items() if k not in seen.images}
    inputs |= {"input_ids": ids, "attention_mask": seen.mask}
    pad_id = _pad_id(host, ids, real)
    coordinates, given = host.rope_positions(inputs, seen.images), inputs.pop("position_ids", None)
    packed = packing_of(seen.packed, coordinates is None, positions, layers)
    selection = _choose(pruner, seen, run, of_rows)
    fixed = coordinates is not None or (given is not None and packed is None)
    if positions == "original" or fixed:
        selection = selection.in_raster_order()  # every row has the position of its place
    kept = host.apply(encoded, selection)
    keep = real & ~seen.placeholder
    keep[seen.slots[kept.positions.to(seen.slots.device)].unbind(dim=1)] = True

    lined = line_up(inputs, keep, real, given, coordinates, packed, positions, layers, pad_id)
    short, index, padding = lined.inputs, lined.index, lined.padding
    image_tokens = seen.placeholder.gather(1, index) & ~padding
    added, renumber = kept.deepstack, positions == "contiguous" and not fixed
    prompt = Prompt(
        input_ids=ids,
        keep=keep,
        columns=index.masked_fill(padding, -1),
        short_ids=short["input_ids"],
        short_mask=~padding,
        embeddings=_embed(host, short["input_ids"], image_tokens, kept),
        positions=short.get("position_ids"),
        rope_deltas=lined.rope_deltas,
        images=seen.images,
        encoded=replace(encoded, output=None),  # prompts are kept for as long as an answer takes
        selection=selection,
        deepstack=None if added is None else Deepstack.at(image_tokens, added),
        layers=_plan(host, layers, of_rows, seen, kept, index, padding, renumber),
    )
    return Shortened(short, prompt, encoded.output, kept)


def _choose(
    pruner: Pruner | None,
    seen: Seen,
    run: Select,
    of_rows: Sequence[Mapping[Stage, Pruner]] | None,
) -> Selection:
    tokens, own = seen.encoded.tokens, None
    if pruner is None:
        return keep_all(tokens)
    if of_rows is not None:
        rows = seen.slots[seen.encoded.first_rows(seen.slots.device), 0].tolist()
        own = [of_rows[row]["llm_input"] for row in rows]
    selection = select_shares(pruner, tokens, run, own)
    check_selection(pruner, tokens, selection)
    return selection


def _plan(
    host: Host,
    layers: LayerPruner | None,
    of_rows: Sequence[Mapping[Stage, Pruner]] | None,
    seen: Seen,
    kept: Kept,
    index: Tensor,
    padding: Tensor,
    may_renumber: bool,
) -> LayerPlan | None:
    if layers is None:
        return None
    images = _image_columns(host, seen, kept, index, padding)
    tower = seen.encoded.tokens if layers.tower_needs != Needs() else None
    renumber = may_renumber and layers.positions == "contiguous"
    num_layers = len(host.language_model.layers)
    own = None
    if of_rows is not None:
        own = [part for row in of_rows if isinstance(part := row["llm_layers"], LayerPruner)]
    return plan_layers(layers, num_layers, *images, ~padding, renumber, tower, own)


def _image_columns(
    host: Host, seen: Seen, kept: Kept, index: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor]:
    """[B, L'] the image of each column, and which of its tokens it is; -1 for text and padding."""
    device = seen.slots.device
    positions = kept.positions.to(device)
    starts = seen.encoded.first_rows(device).unique()
    rows, columns = seen.slots[positions].unbind(dim=1)
    numbers, places = torch.full_like(seen.input_ids, -1), torch.full_like(seen.input_ids, -1)
    numbers[rows, columns] = torch.searchsorted(starts, positions, right=True) - 1
    places[rows, columns] = host.tokens_of_rows(seen.encoded).to(device)[positions]
    numbers, places = numbers.gather(1, index), places.gather(1, index)
    return numbers.masked_fill(padding, -1), places.masked_fill(padding, -1)


def _embed(host: Host, short_ids: Tensor, image_tokens: Tensor, kept: Kept) -> Tensor:
    """[B, L', D'] the embeddings of the text, and the kept rows where `image_tokens` is True."""
    text: Tensor = host.model.get_input_embeddings()(short_ids)
    rows = kept.embeddings.to(text.device, text.dtype)
    return text.masked_scatter(image_tokens[:, :, None].to(text.device), rows)


def _pad_id(host: Host, ids: Tensor, real: Tensor) -> int:
    """The id that the caller pads with; without padding, the model's."""
    if not bool(real.all()):
        return int(ids[~real][0])
    text_config = host.model.config.get_text_config()
    for source in (getattr(host.model, "generation_config", None), text_config):
        pad = getattr(source, "pad_token_id", None)
        if isinstance(pad, int):
            return pad
    return 0
