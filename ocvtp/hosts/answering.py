"""A frozen language model reads questions, as they are or through gates, from any of its layers on.

No forward of a model is copied: the language model runs as it is.

L columns of a prompt with its answer, T columns that predict a token of an answer, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ocvtp.hosts.asked import Asked
from ocvtp.hosts.asked_column import (
    added,
    answer_after,
    attention_after,
    cache_for,
    rotary_positions,
)
from ocvtp.hosts.base import Host
from ocvtp.hosts.in_llm.attention import rows_of_attention, turn
from ocvtp.hosts.prompt.columns import pads_on_right
from ocvtp.selectors.relaxations import Gates
from ocvtp.structures import AttentionKey, AttentionKind, LayerTokens, take
from ocvtp.towers.hooks import after, before, placed
from ocvtp.towers.module_state import on_device
from ocvtp.transformers_names import GATED, attention_of, cache_name

Raters = Literal["text", "last"]
"""Whose attention is read: the mean over the text after the image, or the prompt's last token."""
_KINDS: tuple[AttentionKind, ...] = ("last", "last_heads", "text")
_CHUNK = 64  # rows of attention at a time


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
    with _watched(host, asked, _keys(layers, raters)) as found:
        states = _run(host, asked, None, arguments)[rows, columns]
    head = host.model.get_output_embeddings()
    targets = asked.labels[rows, columns + 1]
    attention = {layer: values for (layer, _), values in found.items()}
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
    with _watched(host, asked, _keys(layers, rows)) as found:
        if layers:
            _run(host, asked, max(layers), {})
    return {layer: values for (layer, _), values in found.items()}


@torch.no_grad()
def before_layer(
    host: Host,
    asked: Asked,
    layer: int,
    attention: Sequence[AttentionKey] = (),
    column: int | None = None,
) -> Asked:
    """The same questions before a later layer; the language model reads on from there.

    Its visual tokens are what a pruner inside the language model sees: `LayerTokens` of all rows of
    the image, in order; those that are no tokens have the place -1.

    Args:
        host: of the model.
        asked: the questions.
        layer: counted from 0; not before the last that adds rows of the tower.
        attention: what of it a scorer reads there: `last`, `last_heads` and `text` of layers up to
            this one.
        column: a layer up to this one, whose attention a column after the prompt gets, see
            `LayerTokens.column`. Its gradient runs through the layers before.

    Raises:
        ValueError: for a layer that the language model has not, or before these, for other
            attention, and for a column where layers run again in the backward pass.
    """
    _check_layers(host, asked, [layer])
    if layer < host.num_deepstack_layers:
        raise ValueError(
            f"before layer {layer} the language model has yet to add what the tower has for layers"
            f" below {host.num_deepstack_layers}; pass a layer from there on."
        )
    order = (~asked.image).long().argsort(dim=1, stable=True)
    counts = asked.image.sum(dim=1, keepdim=True)  # [B, 1]
    columns = order[:, : int(counts.max())]
    valid = torch.arange(columns.shape[1], device=columns.device) < counts
    seen_by = replace(asked, columns=columns.masked_fill(~valid, -1))
    past = None if column is None else cache_for(host)
    with _watched(host, seen_by, attention) as found, rotary_positions(host) as positions:
        hidden = _run(host, asked, layer, {}, past)
    text, text_valid = asked.text()
    seen = take(hidden, columns)
    tokens = LayerTokens(
        features=seen,
        projected=seen,
        grid_hw=(1, columns.shape[1]),
        valid=None if bool(valid.all()) else valid,
        places=_places(asked).gather(1, columns).masked_fill(~valid, -1),
        text=take(hidden, text),
        text_valid=text_valid,
        attention=found,
        tower=asked.tokens,
        column=None
        if past is None
        else attention_after(host, seen_by, layer, hidden, past, positions),
    )
    return replace(
        seen_by,
        embeddings=hidden,
        tokens=tokens,
        lines=None,
        ends=None,
        deepstack=None,
        start=layer,
        whole=asked,
    )


def _places(asked: Asked) -> Tensor:
    """[B, L] which of the image's tokens each column is, -1 for others."""
    places = torch.full_like(asked.labels, -1)
    numbers = torch.arange(asked.columns.shape[1], device=places.device)
    there = asked.columns >= 0
    owners = there.nonzero()[:, 0]
    places[owners, asked.columns[there]] = numbers.expand_as(asked.columns)[there]
    return places


def after_column(host: Host, asked: Asked, vectors: Tensor) -> Answered:
    """Let the whole language model answer after one more column, with all visual tokens in place.

    The column stands between the prompt and its answer: from there the model begins to answer, and
    what it answers is read after the column. Gradients reach the vectors alone.

    Args:
        host: of the model.
        asked: the questions, before any layer.
        vectors: [l + 1, D'], see `LayerTokens.column`.

    Raises:
        ValueError: where layers run again in the backward pass.
    """
    asked, past = asked.whole or asked, cache_for(host)
    with torch.no_grad():
        _run(host, asked, None, {}, past)
    answer, labels = answer_after(asked, vectors[0])
    with placed(added(host, vectors)):
        found = _run(host, answer, None, {}, past)
    rows, columns = (labels >= 0).nonzero().unbind(dim=1)
    states = found[rows, columns]
    head = host.model.get_output_embeddings()
    return Answered(head(states), states, rows, labels[rows, columns])


def _run(
    host: Host, asked: Asked, stop: int | None, arguments: dict[str, Any], cache: Any = None
) -> Tensor:
    """[B, L, D'] normed states after the last layer; those before layer `stop`, not normed."""
    model, mask = host.language_model, asked.mask
    if cache is not None:
        arguments = arguments | {cache_name(): cache}
    if asked.deepstack is not None:
        arguments = arguments | asked.deepstack.arguments()
    if pads_on_right(mask):  # which no token looks at, so that no mask is needed
        mask = torch.ones_like(mask)
    states: list[Tensor] = []
    watch = before(model.norm, lambda norm, args: states.append(args[0]))
    with _layers(model, slice(asked.start, stop)), placed([] if stop is None else [watch]):
        output = model(
            inputs_embeds=asked.embeddings,
            attention_mask=mask.long(),
            position_ids=asked.positions,
            use_cache=cache is not None,
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


def _keys(layers: Sequence[int], raters: Raters) -> list[AttentionKey]:
    if layers and raters not in get_args(Raters):
        raise ValueError(f"raters={raters!r}; pass one of {', '.join(get_args(Raters))}.")
    return [(layer, raters) for layer in layers]


@contextmanager
def _watched(
    host: Host, asked: Asked, keys: Sequence[AttentionKey]
) -> Iterator[dict[AttentionKey, Tensor]]:
    """Attention of some layers, of what the language model reads inside the block."""
    found: dict[AttentionKey, Tensor] = {}
    if not keys:
        yield found
        return
    if unknown := [kind for _, kind in keys if kind not in _KINDS]:
        raise ValueError(
            f"attention {unknown[0]!r} is not read of questions; pass one of {', '.join(_KINDS)}."
        )
    layers = {layer for layer, _ in keys}
    _check_layers(host, asked, sorted(layers))
    model, rope = host.language_model, list[Any]()
    own, furthest = model.layers, max(layers)

    def keep_rope(module: Any, args: Any, output: Any) -> None:
        rope[:] = [output]

    @torch.no_grad()
    def keep(number: int, module: Any, args: Any, kwargs: Any) -> None:
        wanted = [key for key in keys if key[0] == number and key not in found]
        hidden = args[0] if args else kwargs["hidden_states"]
        for key in wanted:  # none, where the layer ran and this is the last norm
            with on_device(own[number]):
                found[key] = _received(asked, own[number], hidden, rope[0], key[1])

    hooks = [after(model.rotary_emb, keep_rope)]
    for number in sorted(layers):
        hooks.append(before(own[number], partial(keep, number), with_kwargs=True))
    hooks.append(before(model.norm, partial(keep, furthest), with_kwargs=True))
    with placed(hooks):
        yield found


def _received(asked: Asked, layer: Any, hidden: Tensor, rope: Any, kind: AttentionKind) -> Tensor:
    """[B, N] the mean of what the columns of a kind give; [B, N, H] of heads apart."""
    attention = layer.self_attn
    cos, sin = rope
    asking, counts = asked.last[:, None], torch.ones_like(asked.last[:, None], dtype=torch.bool)
    if kind == "text":
        asking, counts = asked.text()
    normed = layer.input_layernorm(hidden)
    keys = turn(attention, attention.k_proj(normed), "k_norm", cos, sin)
    if kind == "last_heads":
        turns = (_at(values, asking) for values in rope)
        queries = turn(attention, attention.q_proj(take(normed, asking)), "q_norm", *turns)
        apart = rows_of_attention(queries, keys, attention.scaling, asked.mask, asking, True)[:, 0]
        return take(apart, asked.columns.clamp(min=0)) * (asked.columns >= 0)[:, :, None]
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
