"""One more column after a prompt that the language model has read, which nothing else sees.

As the learnt row of GlimpsePrune (https://arxiv.org/abs/2508.01548): it begins as a vector, and
before every further layer another is added to it. The layers themselves run, as in a decode step,
on keys and values of the prompt that they leave as they are.

I rows, S columns of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocvtp.hosts.in_llm.attention import rows_of_attention, turn
from ocvtp.towers.module_state import on_device
from ocvtp.transformers_names import run_layer


@dataclass(frozen=True)
class Column:
    """The place after a prompt.

    Args:
        model: the language model.
        mask: [I, S] bool, the columns of the prompt that it sees.
        positions: [..., I, 1] its own, as the model's rotary embedding takes them.
        past: layer -> keys and values [I, H', S, d] of the prompt, of layers that ran.
        keys: layer -> its keys [I, H', S, d], also of the coming one.
    """

    model: Any
    mask: Tensor
    positions: Tensor
    past: Callable[[int], tuple[Tensor, Tensor]]
    keys: Callable[[int], Tensor]

    def attention(self, vectors: Tensor) -> Tensor:
        """[I, S, H] in fp32: what each head of layer l attends to.

        Args:
            vectors: [l + 1, D'], see `LayerTokens.column`.

        Raises:
            ValueError: for vectors of another width.
        """
        block, keys = len(vectors) - 1, self.keys(len(vectors) - 1)
        width = self.model.config.hidden_size
        if vectors.shape[1] != width:
            raise ValueError(
                f"the column after the prompt is {vectors.shape[1]} wide, and this language model"
                f" {width}; pass a checkpoint that was trained in this model."
            )
        added = vectors.to(keys.device, keys.dtype)
        mask = pad(self.mask, (0, 1), value=True)
        hidden = added[0].expand(len(mask), 1, -1)
        rope = self.model.rotary_emb(hidden, self.positions)
        for number in range(block):
            past = self.past(number)
            hidden = run_layer(
                self.model.config,
                self.model.layers[number],
                number,
                hidden.to(past[0].device),
                past,
                mask.to(past[0].device),
                tuple(part.to(past[0].device) for part in rope),
            )
            hidden = hidden + added[number + 1].to(hidden.device)
        return self._rows(self.model.layers[block], hidden.to(keys.device), keys, mask, rope)

    def _rows(self, layer: Any, hidden: Tensor, keys: Tensor, mask: Tensor, rope: Any) -> Tensor:
        attention, mask = layer.self_attn, mask.to(keys.device)
        cos, sin = (part.to(keys.device) for part in rope)
        with on_device(layer):
            normed = layer.input_layernorm(hidden)
            queries = turn(attention, attention.q_proj(normed), "q_norm", cos, sin)
            own = turn(attention, attention.k_proj(normed), "k_norm", cos, sin)
        place = torch.full_like(mask[:, :1], keys.shape[2], dtype=torch.long)
        shares = rows_of_attention(
            queries, torch.cat([keys, own], dim=2), attention.scaling, mask, place, True
        )
        return shares[:, 0, :-1]


def next_position(positions: Tensor, last: Tensor) -> Tensor:
    """[..., I, 1] the position after that of columns `last` [I], of positions [..., 1 or I, S]."""
    positions = positions.expand(*positions.shape[:-2], len(last), -1)
    place = last[:, None].expand(*positions.shape[:-1], 1)
    return positions.gather(-1, place) + 1


def given_positions(args: Any, kwargs: Any) -> Tensor:
    """[..., 1 or B, q] what a rotary embedding was called with."""
    found: Tensor = args[1] if len(args) > 1 else kwargs["position_ids"]
    return found
