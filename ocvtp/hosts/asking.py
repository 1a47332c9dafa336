"""Questions with their answers, as a frozen language model reads them: embeddings, labels, places.

The way of a call ends before the language model; what it would read is handed on as tensors that a
gate may change, and that gradients may run through. No forward of a model is copied: the language
model runs as it is, from any of its layers on.

L columns of a prompt with its answer, T columns that predict a token of an answer, V words, M text
tokens after an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ocvtp.hosts.base import Host
from ocvtp.hosts.in_llm.attention import rows_of_attention, turn
from ocvtp.hosts.in_llm.deepstack import Deepstack
from ocvtp.hosts.in_llm.plan import text_after
from ocvtp.hosts.prompt.clip_text import TextTower
from ocvtp.hosts.prompt.columns import layout, pads_behind
from ocvtp.hosts.prompt.read_prompt import make_reader
from ocvtp.hosts.prompt.shorten import Positions, Shortened, look, shorten
from ocvtp.hosts.registry import find_host
from ocvtp.selectors.relaxations import Gates
from ocvtp.structures import LayerTokens, Needs, VisualTokens, take
from ocvtp.towers.hooks import Hook, Removable, after, before, put
from ocvtp.towers.module_state import on_device
from ocvtp.transformers_names import GATED, attention_of

Raters = Literal["text", "last"]
"""Whose attention is read: the mean over the text after the image, or the prompt's last token."""
_CHUNK = 64  # rows of attention at a time


@dataclass(frozen=True)
class Asked:
    """Prompts with answers, one image in each, before a layer of the language model.

    Args:
        embeddings: [B, L, D'], what the layer reads.
        mask: [B, L] bool, False on padding.
        positions: [B, L], or [1 + C, B, L] where tokens have C coordinates; None where they are
            numbered along the columns.
        labels: [B, L] the tokens of answers, -100 elsewhere.
        columns: [B, N] of every visual token; -1 on padding, and for what was dropped.
        tokens: what was asked for of them, as a pruner there sees them.
        image: [B, L] bool, columns of the image: its tokens, and what stands between them.
        lines: [B, L] the line that a token is in, -1 for other columns; None where nothing ends
            lines. ends: [B, L] the same of what ends a line: it goes when all of the line's tokens
            do.
        deepstack: what the language model adds to its hidden states; None if it adds nothing.
        start: the layer that reads the embeddings, and the first that will run.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor | None
    labels: Tensor
    columns: Tensor
    tokens: VisualTokens
    image: Tensor
    lines: Tensor | None = None
    ends: Tensor | None = None
    deepstack: Deepstack | None = None
    start: int = 0

    @property
    def last(self) -> Tensor:
        """[B] the column of the prompt's last token, before the first token of the answer."""
        width = torch.arange(self.mask.shape[1], device=self.mask.device)
        answer = self.labels >= 0
        first = width.masked_fill(~answer, self.mask.shape[1]).amin(dim=1, keepdim=True)
        return (width * (self.mask & (width < first))).argmax(dim=1)

    def text(self) -> tuple[Tensor, Tensor]:
        """[B, M] columns of the prompt's text after the image, and [B, M] bool which count.

        Where no text follows an image, it is all text of the prompt. Answers are not among it.
        """
        width = torch.arange(self.mask.shape[1], device=self.mask.device)
        end = (width * self.image).amax(dim=1, keepdim=True)
        prompt = self.mask & (self.labels < 0)
        return text_after(torch.where(self.image, 0, -1), prompt, end)

    def by_column(self, gates: Tensor) -> Tensor:
        """[B, N] gates of the visual tokens, for every column: [B, L], 1 where there is no token.

        What ends a line has the greatest gate of the line's tokens.
        """
        length = self.mask.shape[1]
        places = torch.where(self.columns < 0, length, self.columns)
        spread = gates.new_ones(len(places), length + 1).scatter(1, places, gates)[:, :length]
        if self.lines is None or self.ends is None:
            return spread
        num_lines = int(self.ends.max()) + 1
        in_line = torch.where(self.lines < 0, num_lines, self.lines).flatten()
        greatest = gates.new_zeros(num_lines + 1)
        greatest = greatest.scatter_reduce(0, in_line, spread.flatten(), "amax")
        return torch.where(self.ends < 0, spread, greatest[self.ends.clamp(min=0)])

    def weighted(self, gates: Tensor) -> Asked:
        """The same, every column times its gate [B, L], and so what a layer adds to it."""
        embeddings = (self.embeddings * gates[:, :, None]).to(self.embeddings.dtype)
        deepstack = self.deepstack
        if deepstack is not None:
            of_rows = gates_of_rows(deepstack, gates)
            rows = (deepstack.rows * of_rows[None, :, None]).to(deepstack.rows.dtype)
            deepstack = replace(deepstack, rows=rows)
        return replace(self, embeddings=embeddings, deepstack=deepstack)

    def repeat(self, times: int) -> Asked:
        """Every question so many times, one after the other."""

        def repeated(values: Tensor) -> Tensor:
            return values.repeat_interleave(times, dim=0)

        changed: dict[str, Any] = {
            f.name: repeated(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        if self.positions is not None and self.positions.ndim == 3:
            changed["positions"] = self.positions.repeat_interleave(times, dim=1)
        if self.deepstack is not None:
            changed["deepstack"] = replace(self.deepstack, places=repeated(self.deepstack.places))
        return replace(self, tokens=self.tokens.map(repeated), **changed)


@dataclass(frozen=True)
class Answered:
    """What the language model made of questions, at the columns that predict answers.

    Args:
        logits: [T, V]. states: [T, D'], normed, what these are made of.
        owner: [T] int64 the question that each is of, ascending.
        targets: [T] int64 the token that each should predict.
        attention: layer -> [B, N], see `attention_rows`.
    """

    logits: Tensor
    states: Tensor
    owner: Tensor
    targets: Tensor
    attention: Mapping[int, Tensor] = field(default_factory=dict)


class GateLike(Protocol):
    """How gates act, see `ocvtp.hosts.gating.Gate`."""

    def __call__(
        self, asked: Asked, gates: Gates, generator: torch.Generator | None = None
    ) -> tuple[Asked, dict[str, Any]]:
        """What the language model reads in place of `asked`, and arguments of its attention."""


class Asker:
    """Turns what a processor returned into what a language model reads.

    In a `with` block it has its hooks in the model; outside, the model is as it was.

    Args:
        model: a supported VLM, see `find_host`; or a `Host`.
        processor: what makes its inputs, for scorers that read the prompt; None looks for the one
            saved with the model.
        needs: of the scorer.
        text_tower: see `ocvtp.attach`.

    Raises:
        ValueError: if the model cannot supply what is needed.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        needs: Needs | None = None,
        text_tower: TextTower = None,
    ) -> None:
        self.host = model if isinstance(model, Host) else find_host(model)
        self.needs = Needs() if needs is None else needs
        self.host.check(self.needs)
        self._reader = make_reader(self.host, self.needs, processor, text_tower)
        self._installed: list[Removable] = []

    def __enter__(self) -> Asker:
        self._installed = self.host.install(self.needs)
        return self

    def __exit__(self, *error: object) -> None:
        while self._installed:
            self._installed.pop().remove()

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], answers: Tensor) -> Asked:
        """Questions with their answers, all visual tokens in place.

        Args:
            inputs: what the processor returned, on the model's device: one prompt a row with one
                image in it, and the answer's tokens after it; padded on the right, better than on
                the left.
            answers: [B, L] bool, True on the tokens of answers. A scorer does not read them.

        Raises:
            ValueError: if rows have no image or several, or `answers` are not of the prompts.
            RuntimeError: outside of a `with` block.
        """
        if not self._installed and self.host.hooks(self.needs):
            raise RuntimeError("an Asker asks inside its `with` block, which has its hooks.")
        given = dict(inputs)
        ids = given["input_ids"]
        mask = given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        _check_answers(answers, ids, mask, self.host.image_token_id)
        answers = answers.to(mask.device)
        given["attention_mask"] = mask * ~answers  # answers are no part of what is read
        seen = look(self.host, self.needs, given, self._reader)
        mask = mask.to(seen.input_ids.device)
        seen = replace(seen, mask=mask, real=mask.bool())
        rows = seen.slots[seen.encoded.first_rows(seen.slots.device), 0]
        _check_images(rows.tolist(), seen.encoded.tokens.batch_size, len(ids))
        given["labels"] = torch.where(answers, ids.to(answers.device), -100)
        short = shorten(self.host, None, given, seen, positions="original")
        return self._of(short, seen.slots)

    def _of(self, short: Shortened, slots: Tensor) -> Asked:
        """Of a prompt that lost no tokens."""
        prompt, kept = short.prompt, short.kept
        ids, encoded = prompt.input_ids, prompt.encoded
        device = ids.device
        positions = kept.positions.to(device)
        rows, columns = slots[positions].unbind(dim=1)

        def spread(values: Tensor) -> Tensor:
            """[R] of the image's rows, for the columns [B, L]."""
            whole = torch.full_like(ids, -1)
            whole[rows, columns] = values.to(device)[positions]
            return prompt.shorten(whole, -1)

        places = spread(self.host.tokens_of_rows(encoded))
        image = spread(torch.zeros(len(encoded.embeddings), dtype=torch.long)) == 0
        lines = ends = self.host.lines(encoded)
        if lines is not None:
            lines = spread(lines)
            ends, lines = lines.masked_fill(places >= 0, -1), lines.masked_fill(places < 0, -1)
        found = torch.full((len(ids), encoded.tokens.num_tokens), -1, device=device)
        owners, at = (places >= 0).nonzero().unbind(dim=1)
        found[owners, places[owners, at]] = at
        return Asked(
            embeddings=prompt.embeddings,
            mask=prompt.short_mask,
            positions=prompt.positions,
            labels=short.inputs["labels"].to(device),
            columns=found,
            tokens=encoded.tokens,
            image=image,
            lines=lines,
            ends=ends,
            deepstack=prompt.deepstack,
        )


def gates_of_rows(deepstack: Deepstack, gates: Tensor) -> Tensor:
    """[R'] gates of the rows that a language model adds, of gates of the columns [B, L]."""
    there = deepstack.places >= 0
    ones = gates.new_ones(deepstack.rows.shape[1])
    return ones.scatter(0, deepstack.places[there], gates[there])


def drop(asked: Asked, keep: Tensor, positions: Positions = "contiguous") -> Asked:
    """Questions without the visual tokens that are not kept, as after real pruning.

    Args:
        asked: the questions; gradients run through their embeddings.
        keep: [B, N] bool, which tokens stay.
        positions: `contiguous` numbers what is left from 0; `original` leaves the gaps. Where
            tokens have coordinates, they always keep them.
    """
    stays = asked.mask & (asked.by_column(keep.float()) > 0)
    index, padding = layout(stays, asked.mask, at_end=False)

    def short(values: Tensor, fill: int | bool = 0) -> Tensor:
        return values.gather(-1, index.expand(*values.shape[:-1], -1)).masked_fill(padding, fill)

    numbers = asked.positions
    if numbers is None and positions == "original":
        numbers = (asked.mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if numbers is not None and numbers.ndim == 2 and positions == "contiguous":
        numbers = None
    elif numbers is not None:
        numbers = short(numbers)
        if numbers.ndim == 3:  # the first are plain numbers of the columns
            plain = ((~padding).long().cumsum(dim=1) - 1).clamp(min=0)
            numbers = torch.cat([plain[None], numbers[1:]])
    here = torch.arange(index.shape[1], device=index.device).expand_as(index)
    places = torch.full_like(asked.labels, -1).scatter(1, index, here)
    places = places.masked_fill(~stays, -1)
    columns = places.gather(1, asked.columns.clamp(min=0)).masked_fill(asked.columns < 0, -1)
    lines, ends, deepstack = asked.lines, asked.ends, asked.deepstack
    return replace(
        asked,
        embeddings=take(asked.embeddings, index),
        mask=~padding,
        positions=numbers,
        labels=short(asked.labels, -100),
        columns=columns,
        image=short(asked.image, False),
        lines=None if lines is None else short(lines, -1),
        ends=None if ends is None else short(ends, -1),
        deepstack=None
        if deepstack is None
        else replace(deepstack, places=short(deepstack.places, -1)),
    )


def read(
    host: Host,
    asked: Asked,
    gates: Gates | None = None,
    gate: GateLike | None = None,
    *,
    generator: torch.Generator | None = None,
    layers: Sequence[int] = (),
    raters: Raters = "text",
) -> Answered:
    """Let the language model read questions, and predict their answers.

    The head of the model runs at the columns that predict answers alone.

    Args:
        host: of the model.
        asked: the questions.
        gates: of their visual tokens; None reads all as they are.
        gate: how the gates act.
        generator: of what is random about the gate.
        layers: whose attention is returned too, see `attention_rows`. raters: see there.

    Raises:
        ValueError: for gates without a gate, for a gate that acts in the attention outside of
            `gating`, and for layers that do not run.
    """
    arguments: dict[str, Any] = {}
    if gates is not None:
        if gate is None:
            raise ValueError("gates act through a gate; pass one of ocvtp.hosts.gating.")
        asked, arguments = gate(asked, gates, generator)
        if arguments and attention_of(host.language_model) != GATED:
            raise ValueError(
                f"{type(gate).__name__} acts in the attention of the language model; read inside of"
                " `with ocvtp.hosts.gating.gating(model):`."
            )
    rows, columns = (asked.labels[:, 1:] >= 0).nonzero().unbind(dim=1)
    with _watched(host, asked, layers, raters) as attention:
        states = _run(host, asked, None, arguments)[rows, columns]
    head = host.model.get_output_embeddings()
    targets = asked.labels[rows, columns + 1]
    return Answered(head(states), states, rows, targets, attention)


@torch.no_grad()
def attention_rows(
    host: Host, asked: Asked, layers: Sequence[int], rows: Raters = "text"
) -> dict[int, Tensor]:
    """Attention that visual tokens get of the prompt's text, the mean over heads.

    The language model runs no further than to the last of these layers. Answers are not read.

    Args:
        host: of the model.
        asked: the questions.
        layers: of the language model, counted from 0.
        rows: `text`: the mean over the rows of the text after the image; `last`: the row of the
            prompt's last token.

    Returns:
        layer -> [B, N] in fp32, shares of all that a row attends to; 0 on padding.

    Raises:
        ValueError: for layers that the language model has not, or that do not run.
    """
    with _watched(host, asked, layers, rows) as found:
        if layers:
            _run(host, asked, max(layers), {})
    return found


@torch.no_grad()
def before_layer(host: Host, asked: Asked, layer: int) -> Asked:
    """The same questions before a later layer; the language model reads on from there.

    Its visual tokens are what a pruner inside the language model sees: `LayerTokens` of all rows of
    the image, in order; those that are no tokens have the place -1.

    Args:
        host: of the model.
        asked: the questions.
        layer: counted from 0; not before the last that adds rows of the tower.

    Raises:
        ValueError: for a layer that the language model has not, or before these.
    """
    _check_layers(host, asked, [layer])
    if layer < host.num_deepstack_layers:
        raise ValueError(
            f"before layer {layer} the language model has yet to add what the tower has for layers"
            f" below {host.num_deepstack_layers}; pass a layer from there on."
        )
    hidden = _run(host, asked, layer, {})
    order = (~asked.image).long().argsort(dim=1, stable=True)
    counts = asked.image.sum(dim=1, keepdim=True)  # [B, 1]
    columns = order[:, : int(counts.max())]
    valid = torch.arange(columns.shape[1], device=columns.device) < counts
    places = torch.full_like(asked.labels, -1)
    numbers = torch.arange(asked.columns.shape[1], device=places.device)
    there = asked.columns >= 0
    owners = there.nonzero()[:, 0]
    places[owners, asked.columns[there]] = numbers.expand_as(asked.columns)[there]
    text, text_valid = asked.text()
    seen = take(hidden, columns)
    tokens = LayerTokens(
        features=seen,
        projected=seen,
        grid_hw=(1, columns.shape[1]),
        valid=None if bool(valid.all()) else valid,
        places=places.gather(1, columns).masked_fill(~valid, -1),
        text=take(hidden, text),
        text_valid=text_valid,
        tower=asked.tokens,
    )
    return replace(
        asked,
        embeddings=hidden,
        columns=columns.masked_fill(~valid, -1),
        tokens=tokens,
        lines=None,
        ends=None,
        deepstack=None,
        start=layer,
    )


def _run(host: Host, asked: Asked, stop: int | None, arguments: dict[str, Any]) -> Tensor:
    """[B, L, D'] normed states after the last layer; those before layer `stop`, not normed."""
    model, mask = host.language_model, asked.mask
    if asked.deepstack is not None:
        arguments = arguments | asked.deepstack.arguments()
    if pads_behind(mask):  # which no token looks at, so that no mask is needed
        mask = torch.ones_like(mask)
    states: list[Tensor] = []
    watch = before(model.norm, lambda norm, args: states.append(args[0]))
    with _layers(model, slice(asked.start, stop)), _put([] if stop is None else [watch]):
        output = model(
            inputs_embeds=asked.embeddings,
            attention_mask=mask.long(),
            position_ids=asked.positions,
            use_cache=False,
            **arguments,
        )
    final: Tensor = output.last_hidden_state if stop is None else states[0]
    return final


@contextmanager
def _layers(model: Any, wanted: slice) -> Iterator[None]:
    """Inside the block, a language model has some of its layers alone."""
    own = model.layers
    if wanted == slice(0, None):
        yield
        return
    model.layers = nn.ModuleList(own[wanted])
    try:
        yield
    finally:
        model.layers = own


@contextmanager
def _put(hooks: Sequence[Hook]) -> Iterator[None]:
    placed = put(hooks)
    try:
        yield
    finally:
        for hook in placed:
            hook.remove()


@contextmanager
def _watched(
    host: Host, asked: Asked, layers: Sequence[int], raters: Raters
) -> Iterator[dict[int, Tensor]]:
    """Attention of some layers, of what the language model reads inside the block."""
    found: dict[int, Tensor] = {}
    if not layers:
        yield found
        return
    if raters not in get_args(Raters):
        raise ValueError(f"raters={raters!r}; pass one of {', '.join(get_args(Raters))}.")
    _check_layers(host, asked, layers)
    model, rope = host.language_model, list[Any]()
    asking, counts = asked.last[:, None], torch.ones_like(asked.last[:, None], dtype=torch.bool)
    if raters == "text":
        asking, counts = asked.text()

    own, furthest = model.layers, max(layers)

    def keep_rope(module: Any, args: Any, output: Any) -> None:
        rope[:] = [output]

    @torch.no_grad()
    def keep(number: int, module: Any, args: Any, kwargs: Any) -> None:
        if number in found:  # it ran, and this is the last norm
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        with on_device(own[number]):
            found[number] = _received(asked, own[number], hidden, rope[0], asking, counts)

    hooks = [after(model.rotary_emb, keep_rope)]
    for number in sorted(set(layers)):
        hooks.append(before(own[number], partial(keep, number), with_kwargs=True))
    hooks.append(before(model.norm, partial(keep, furthest), with_kwargs=True))
    with _put(hooks):
        yield found


def _received(
    asked: Asked, layer: Any, hidden: Tensor, rope: Any, asking: Tensor, counts: Tensor
) -> Tensor:
    """[B, N] the mean of what columns `asking` [B, R] give, of those that count [B, R]."""
    attention = layer.self_attn
    cos, sin = rope
    normed = layer.input_layernorm(hidden)
    keys = turn(attention, attention.k_proj(normed), "k_norm", cos, sin)
    total = hidden.new_zeros(asked.columns.shape, dtype=torch.float32)
    columns = asked.columns.clamp(min=0)[:, None]
    for part, own in zip(asking.split(_CHUNK, dim=1), counts.split(_CHUNK, dim=1), strict=True):
        turns = (_at(values, part) for values in (cos, sin))
        queries = turn(attention, attention.q_proj(take(normed, part)), "q_norm", *turns)
        shares = rows_of_attention(queries, keys, attention.scaling, asked.mask, part)
        shares = shares.gather(2, columns.expand(-1, part.shape[1], -1))
        total += (shares * own[:, :, None]).sum(dim=1)
    return total.masked_fill(asked.columns < 0, 0) / counts.sum(dim=1, keepdim=True).clamp(min=1)


def _at(part: Tensor, columns: Tensor) -> Tensor:
    """[..., 1 or B, L, d] at columns [B, R]: [..., B, R, d]."""
    part = part.expand(*part.shape[:-3], len(columns), *part.shape[-2:])
    index = columns[:, :, None].expand(*part.shape[:-2], -1, part.shape[-1])
    return part.gather(-2, index)


def _check_layers(host: Host, asked: Asked, layers: Sequence[int]) -> None:
    """Refuse layers that do not run.

    Raises:
        ValueError: for these.
    """
    count = len(host.language_model.layers)
    if beyond := [layer for layer in layers if not asked.start <= layer < count]:
        raise ValueError(
            f"layer {beyond[0]} of the language model does not run here; pass"
            f" {asked.start} to {count - 1}."
        )


def _check_images(rows: list[int], num_images: int, num_rows: int) -> None:
    """Refuse all but one image a row.

    Raises:
        ValueError: for these.
    """
    if num_images != num_rows or rows != [*range(num_rows)]:
        counts = [rows.count(row) for row in range(num_rows)]
        raise ValueError(
            f"the rows of the batch have {counts} images; pass questions about one image each, and"
            " one question a row."
        )


def _check_answers(answers: Tensor, ids: Tensor, mask: Tensor, image_token_id: int) -> None:
    """Refuse answers that are none of the prompts.

    Raises:
        ValueError: for these.
    """
    if answers.shape != ids.shape or answers.dtype != torch.bool:
        raise ValueError(
            f"answers are {list(answers.shape)} of {answers.dtype}, input_ids {list(ids.shape)};"
            " pass equal shapes, of torch.bool."
        )
    answers = answers.to(ids.device)
    wrong = answers & ((ids == image_token_id) | ~mask.to(ids.device).bool())
    wrong[:, 0] |= answers[:, 0]  # nothing predicts the first token
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"answers are True in column {column} of row {row}, which is padding, a placeholder of"
            " an image, or the first of its row; pass True on tokens of answers alone."
        )
