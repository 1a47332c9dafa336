"""Questions, and one more column after their prompts: see `ocvtp.hosts.in_llm.column`.

L columns of a prompt with its answer, T of the longest answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.asked import Asked
from ocvtp.hosts.base import Host
from ocvtp.hosts.in_llm.attention import turn
from ocvtp.hosts.in_llm.column import Column, given_positions, next_position
from ocvtp.structures import take
from ocvtp.towers.hooks import Hook, before, placed
from ocvtp.transformers_names import is_checkpointed, layer_keys, new_cache


def cache_for(host: Host) -> Any:
    """An empty KV cache for the prompt that a column follows.

    Raises:
        ValueError: where layers run again in the backward pass, and do without one.
    """
    with torch.enable_grad():  # as when the column is read
        runs_again = any(map(is_checkpointed, host.language_model.layers))
    if runs_again:
        raise ValueError(
            "a column after the prompt reads keys and values of the prompt, which layers that run"
            " again in the backward pass do not keep; leave checkpointing out."
        )
    return new_cache()


@contextmanager
def rotary_positions(host: Host) -> Iterator[list[Tensor]]:
    """Positions of the columns that the language model reads inside the block, as it turns them."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found[:] = [given_positions(args, kwargs)]

    with placed([before(host.language_model.rotary_emb, keep, with_kwargs=True)]):
        yield found


def attention_after(
    host: Host, asked: Asked, layer: int, hidden: Tensor, past: Any, positions: list[Tensor]
) -> Callable[[Tensor], Tensor]:
    """What a column after the prompt attends to before a layer, see `LayerTokens.column`.

    Args:
        host: of the model. asked: the questions, with columns of whole images.
        layer: the coming one. hidden: [B, L, D'] before it.
        past: cache of the layers before. positions: those of the L columns, alone in a list.
    """
    model, numbers = host.language_model, positions[0]

    def keys(block: int) -> Tensor:
        if block < layer:
            return layer_keys(past, block)[0]
        attention = model.layers[block].self_attn
        normed = model.layers[block].input_layernorm(hidden)
        rope = model.rotary_emb(hidden, numbers)
        return turn(attention, attention.k_proj(normed), "k_norm", *rope)

    place = next_position(numbers, asked.last)
    column = Column(model, _prompt(asked), place, partial(layer_keys, past), keys)

    def attention(vectors: Tensor) -> Tensor:
        found = take(column.attention(vectors), asked.columns.clamp(min=0))
        return found * (asked.columns >= 0)[:, :, None]

    return attention


def answer_after(asked: Asked, first: Tensor) -> tuple[Asked, Tensor]:
    """What is read after prompts that are in a cache, with all of their L columns.

    Args:
        asked: the questions, before the first layer. first: [D'] of the column.

    Returns:
        the column and then the answer, of each question, with a mask of all that is read,
        [B, L + 1 + T]; and [B, T] the token that should follow each of its columns but the last,
        -100 for none.
    """
    prompt = _prompt(asked)
    answer = asked.mask & ~prompt
    order = (~answer).long().argsort(dim=1, stable=True)[:, : int(answer.sum(dim=1).max())]
    said = answer.gather(1, order)
    own = first.to(asked.embeddings).expand(len(order), 1, -1)
    numbers = asked.positions
    if numbers is None:
        numbers = torch.arange(asked.mask.shape[1], device=order.device).expand_as(asked.mask)
    places = order.expand(*numbers.shape[:-1], -1)
    shifted = numbers.gather(-1, places) + 1
    return replace(
        asked,
        embeddings=torch.cat([own, take(asked.embeddings, order)], dim=1),
        mask=torch.cat([prompt, torch.ones_like(prompt[:, :1]), said], dim=1),
        positions=torch.cat([next_position(numbers, asked.last), shifted], dim=-1),
        deepstack=None,
    ), asked.labels.gather(1, order).masked_fill(~said, -100)


def added(host: Host, vectors: Tensor) -> list[Hook]:
    """Hooks that add all vectors but the first, each before its layer, to the first column."""
    layers = host.language_model.layers[1 : len(vectors)]
    return [
        before(layer, partial(_add, vector), with_kwargs=True)
        for layer, vector in zip(layers, vectors[1:], strict=True)
    ]


def _add(vector: Tensor, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    hidden = torch.cat([hidden[:, :1] + vector.to(hidden), hidden[:, 1:]], dim=1)
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _prompt(asked: Asked) -> Tensor:
    """[B, L] bool, the columns of the prompt."""
    width = torch.arange(asked.mask.shape[1], device=asked.mask.device)
    return asked.mask & (width <= asked.last[:, None])
