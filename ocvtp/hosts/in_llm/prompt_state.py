"""The prompt inside the language model, and what pruners see of its images there.

L' columns of the prompt as it is now, T after it; I images of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.in_llm.attention import among_each_other, rows_of_attention, turn, turn_to_start
from ocvtp.hosts.in_llm.column import Column, next_position
from ocvtp.hosts.in_llm.plan import Group, LayerPlan
from ocvtp.pruners.layer_pruner import LayerNeeds
from ocvtp.structures import LayerTokens, take
from ocvtp.towers.module_state import on_device
from ocvtp.towers.recordings import outside
from ocvtp.transformers_names import layer_keys


@dataclass
class Current:
    """The prompt as it is now, in the pass that reads it.

    Args:
        needs: layer -> what is read before it.
        groups: its images.
        mask: [B, L'] bool, False on padding.
        last: [B] the column of the last token.
        origin: [B, L'] the column that each was before anything was dropped.
        lengths: real columns of each row; None where a method chose them.
        length: of the prompt before anything was dropped.
        num_tail: T.
        queries: layer -> [B, q, H d], as they were projected.
        ropes: layer -> cosines and sines of its positions. rope: those of what is left.
        positions: [..., 1 or B, q], of which these were made; None where nobody asks.
    """

    needs: dict[int, LayerNeeds]
    groups: tuple[Group, ...]
    mask: Tensor
    last: Tensor
    origin: Tensor
    lengths: tuple[int, ...] | None
    length: int
    num_tail: int
    queries: dict[int, Tensor] = field(default_factory=dict)
    ropes: dict[int, Any] = field(default_factory=dict)
    rope: Any = None
    positions: Tensor | None = None

    @classmethod
    def start(cls, plan: LayerPlan, embeddings: Tensor, num_tail: int) -> Current:
        """All of the prompt."""
        needs = {layer: plan.pruner.needs_at(layer) for layer in plan.layers}
        asks_text = any(kind == "text" for need in needs.values() for _, kind in need.attention)
        groups = []
        for group in plan.groups:
            raters = None
            if asks_text:
                with torch.no_grad():
                    raters = plan.pruner.raters(_of_hidden(group, embeddings, with_text=True))
            groups.append(group if raters is None else replace(group, raters=raters))
        length = plan.mask.shape[1]
        columns = torch.arange(length, device=embeddings.device).expand(len(plan.mask), -1)
        mask, last = plan.mask.to(columns.device), plan.last.to(columns.device)
        return cls(needs, tuple(groups), mask, last, columns, plan.lengths, length, num_tail)

    def to(self, device: torch.device) -> None:
        """Move to the device of a layer of a model on several."""
        self.groups = tuple(group.to(device) for group in self.groups)
        self.mask, self.last = self.mask.to(device), self.last.to(device)
        self.origin = self.origin.to(device)
        if self.positions is not None:
            self.positions = self.positions.to(device)

    def shrink(self, index: Tensor, real: Tensor) -> Tensor:
        """Keep columns `index` [B, L''] of the prompt, of which some are not `real`.

        Returns:
            [B, L'' + T] them and the columns after the prompt, among the L' + T.
        """
        length = self.mask.shape[1] + self.num_tail
        places = torch.full_like(self.origin, -1)
        new = torch.arange(index.shape[1], device=index.device).expand_as(index)
        places = places.scatter(1, index, new)
        self.origin, self.mask = self.origin.gather(1, index), real
        self.last = places.gather(1, self.last[:, None])[:, 0]
        groups = [
            replace(
                group,
                columns=take(places[group.rows], group.columns),
                text=take(places[group.rows], group.text).clamp(min=0),
            )
            for group in self.groups
        ]
        self.groups = tuple(groups)
        self.queries.clear()
        self.ropes.clear()
        if not self.num_tail:
            return index
        tail = torch.arange(length - self.num_tail, length, device=index.device)
        return torch.cat([index, tail.expand(len(index), -1)], dim=1)

    def spread(self) -> Tensor:
        """[B, L' + T] for every original column the last one left at or before it."""
        found = self.mask.new_zeros(len(self.mask), self.length, dtype=torch.long)
        here = torch.arange(self.mask.shape[1], device=self.mask.device).expand_as(self.mask)
        # Padding is written first, or not at all: several columns of it may have the same origin.
        found = found.scatter_reduce(1, self.origin, here * self.mask, "amax")
        found = found.cummax(dim=1).values
        left = self.mask.shape[1]
        tail = torch.arange(left, left + self.num_tail, device=found.device)
        return torch.cat([found, tail.expand(len(found), -1)], dim=1)


@dataclass(frozen=True)
class Place:
    """Before which layer a choice is made.

    Args:
        model: the language model. number: of the layer. layer: the module.
        hidden: [B, L' + T, D'], what it would read.
        cache: keys of the layers before.
        rope: cosines and sines of the columns' positions.
    """

    model: Any
    number: int
    layer: Any
    hidden: Tensor
    cache: Any
    rope: Any


def tokens_at(plan: LayerPlan, current: Current, group: Group, place: Place) -> LayerTokens:
    """What the pruner of a plan reads of a group."""
    needs = current.needs[place.number]
    keys = {block: _keys(current, place, block) for block in needs.keys}  # [B, H, S, d]
    tokens = _of_hidden(
        group,
        place.hidden,
        with_text=needs.text,
        attention={
            (block, kind): _attention(current, group, place, block, kind)
            for block, kind in needs.attention
        },
        keys={
            block: _from_start(current, group, place, block, k, group.columns)
            for block, k in keys.items()
        },
        text_keys={
            block: _from_start(current, group, place, block, k, group.text)
            for block, k in keys.items()
        },
        num_heads=next((k.shape[1] for k in keys.values()), None),
    )
    if needs.normed:
        norms = {"final": place.model.norm, "layer": place.layer.input_layernorm}
        with on_device(place.layer):
            normed: dict[str, Tensor] = {n: norms[n](tokens.features) for n in needs.normed}
            asked = needs.normed if tokens.text is not None else ()
            text: dict[str, Tensor] = {n: norms[n](tokens.text) for n in asked}
        tokens = replace(tokens, normed=normed, text_normed=text)
    if needs.column is not None:
        tokens = replace(tokens, column=partial(_column, current, group, place))
    if plan.tower is None:
        return tokens
    return replace(tokens, tower=plan.tower.map(lambda values: values[group.images]))


def _of_hidden(group: Group, hidden: Tensor, with_text: bool, **more: Any) -> LayerTokens:
    """What hidden states alone tell of a group."""
    rows = group.rows[:, None]
    return LayerTokens(
        features=hidden[rows, group.columns],
        grid_hw=(1, group.columns.shape[1]),
        places=group.places,
        text=hidden[rows, group.text] if with_text else None,
        text_valid=group.text_valid,
        **more,
    )


def _keys(current: Current, place: Place, block: int) -> Tensor:
    """[B, H, L' + T, d] of a layer that ran, or of the coming one, turned by their positions."""
    if block != place.number:
        assert block in current.ropes, (block, sorted(current.ropes))
        keys: Tensor = place.cache.layers[block].keys
        return keys.to(place.hidden.device)
    attention = place.layer.self_attn
    with on_device(place.layer):
        projected = attention.k_proj(place.layer.input_layernorm(place.hidden))
        return turn(attention, projected, "k_norm", *place.rope)


def _from_start(
    current: Current, group: Group, place: Place, block: int, keys: Tensor, columns: Tensor
) -> Tensor:
    """[I, R, H d] keys [B, H, S, d] at columns [I, R], by positions from their row's first column.

    Without `position_ids` a model counts padding on the left too, and a row's keys would depend on
    what is next to it in the batch.
    """
    rows = group.rows[:, None]
    first = current.mask.int().argmax(dim=1)[rows]  # [I, 1]
    rope = place.rope if block == place.number else current.ropes[block]
    cos, sin = (_at(part.to(keys.device), rows, first) for part in rope)
    own = keys.transpose(1, 2)[rows, columns].transpose(1, 2)
    turned = turn_to_start(place.model.layers[block].self_attn, own, cos, sin)
    return turned.transpose(1, 2).flatten(2)


def _attention(current: Current, group: Group, place: Place, block: int, kind: str) -> Tensor:
    """[I, N] the attention that a group's tokens get, or [I, N, H], see `AttentionKey`."""
    attention = place.model.layers[block].self_attn
    rows = group.rows[:, None]
    own = {"text": group.text, "visual": group.columns}
    asking = own.get(kind, current.last[rows])
    if block == place.number:
        with on_device(place.layer):
            projected = attention.q_proj(place.layer.input_layernorm(place.hidden[rows, asking]))
        rope = place.rope
    else:
        queries = current.queries[block].to(place.hidden.device)
        projected, rope = queries[rows, asking], current.ropes[block]
    cos, sin = (_at(part.to(projected.device), rows, asking) for part in rope)
    keys = _keys(current, place, block)
    queries = turn(attention, projected, "q_norm", cos, sin)
    if group.row_numbers != tuple(range(len(keys))):
        keys = keys[group.rows]
    if kind == "visual":
        index = group.columns[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        return among_each_other(queries, keys.gather(2, index), attention.scaling)
    keys = keys[:, :, : current.mask.shape[1]]  # nothing of the prompt looks after it
    mask = current.mask[group.rows]
    if kind == "last_heads":
        apart = rows_of_attention(queries, keys, attention.scaling, mask, asking, True)[:, 0]
        return take(apart, group.columns)
    shares = rows_of_attention(queries, keys, attention.scaling, mask, asking)  # [I, R, L']
    columns = group.columns[:, None].expand(-1, shares.shape[1], -1)
    shares = shares.gather(2, columns)  # [I, R, N]
    if kind == "last":
        return shares[:, 0]
    raters = group.text_valid if group.raters is None else group.raters & group.text_valid
    weights = raters / raters.sum(dim=1, keepdim=True).clamp(min=1)
    return (weights[:, None].to(shares) @ shares)[:, 0]


def _column(current: Current, group: Group, place: Place, vectors: Tensor) -> Tensor:
    """[I, N, H] what a column after the prompt attends to, see `LayerTokens.column`."""
    assert current.positions is not None
    rows, length = group.rows, current.mask.shape[1]

    def own(part: Tensor) -> Tensor:
        return part[rows, :, :length]

    def past(block: int) -> tuple[Tensor, Tensor]:
        keys, values = layer_keys(place.cache, block)
        return own(keys), own(values)

    column = Column(
        place.model,
        current.mask[rows],
        next_position(current.positions, current.last)[..., rows, :],
        past,
        keys=lambda block: own(_keys(current, place, block)),
    )
    with outside():  # the layers run for this column alone
        return take(column.attention(vectors), group.columns)


def _at(part: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[..., 1 or B, q, d] at rows [I, 1] and columns [I, R]: [..., I, R, d]."""
    rows = rows if part.shape[-3] > 1 else torch.zeros_like(rows)
    return part[..., rows, columns, :]
