"""Slot Attention: slots compete for tokens; D is the slots' width."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Truncation = Literal["bilevel", "none"]


class SlotAttention(nn.Module):
    """Slot Attention with a GRU and a residual feed-forward network.

    Paper: https://arxiv.org/abs/2006.15055, Alg. 1; bi-level truncation of the gradient from
    https://arxiv.org/abs/2210.08990 (BO-QSA): before the last iteration the slots are detached and
    the gradient goes straight to the initial slots.

    Autocast reaches keys and values alone: slots compete in the dtype of the weights, so that in
    bf16 tokens are not tied, nor slots rounded from one iteration to the next.

    Args:
        dim: D, width of tokens and slots.
        ffn_dim: hidden width of the feed-forward network.
        num_iterations: how often the slots are updated; paper: 3.
        dropout: in the feed-forward network, in training.
        truncation: `bilevel`, or `none` to back-propagate through every iteration.
        eps: added to a slot's attention mass before it is divided by it.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_iterations: int = 3,
        dropout: float = 0.01,
        truncation: Truncation = "bilevel",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_iterations < 1:
            raise ValueError(f"num_iterations={num_iterations} is not allowed; pass at least 1.")
        if truncation not in ("bilevel", "none"):
            raise ValueError(f"truncation={truncation!r} is unknown; pass 'bilevel' or 'none'.")
        self.num_iterations = num_iterations
        self.truncation = truncation
        self.eps = eps
        self.norm_inputs = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_ffn = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key = nn.Linear(dim, dim, bias=False)
        self.to_value = nn.Linear(dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn_dim, dim)
        )

    def forward(
        self,
        inputs: Tensor,
        slots: Tensor,
        slot_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Refine the slots.

        Args:
            inputs: [B, N, D] tokens.
            slots: [B, S, D] initial slots.
            slot_mask: [B, S] bool, False for slots that take no part.
            token_mask: [B, N] bool, False for padding tokens, which no slot sees.

        Returns:
            slots [B, S, D] and the last iteration's attention [B, S, N]: a softmax over slots, not
            renormalised over tokens; 0 on padding tokens.
        """
        tokens = self.norm_inputs(inputs)
        # The 1/sqrt(D) of the scores goes into the keys, once.
        keys = self.to_key(tokens).mul(tokens.shape[-1] ** -0.5).transpose(1, 2)  # [B, D, N]
        values = self.to_value(tokens)  # [B, N, D]
        dtype = self.to_query.weight.dtype
        with torch.autocast(inputs.device.type, enabled=False):
            return self._compete(
                keys.to(dtype), values.to(dtype), slots.to(dtype), slot_mask, token_mask
            )

    def _compete(
        self,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        slot_mask: Tensor | None,
        token_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The iterations, on keys [B, D, N] and values [B, N, D]."""
        initial = slots
        attention = keys.new_empty(0)
        for iteration in range(self.num_iterations):
            if self.truncation == "bilevel" and iteration == self.num_iterations - 1:
                slots = slots.detach() + initial - initial.detach()
            logits = self.to_query(self.norm_slots(slots)) @ keys  # [B, S, N]
            if slot_mask is not None:
                logits = logits.masked_fill(~slot_mask[:, :, None], float("-inf"))
            attention = logits.softmax(dim=1)
            if token_mask is not None:
                attention = attention * token_mask[:, None]
            # Dividing the [B, S, D] update by the mass costs less than dividing the attention.
            mass = attention.sum(dim=2, keepdim=True) + self.eps
            slots = self._update((attention @ values) / mass, slots)
        return slots, attention

    def _update(self, update: Tensor, slots: Tensor) -> Tensor:
        slots = self.gru(update.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots + torch.as_tensor(self.ffn(self.norm_ffn(slots)))


def slot_winners(attention: Tensor, tokens_per_slot: int = 1) -> Tensor:
    """The tokens that some slot attends to most.

    Args:
        attention: [B, S, N].
        tokens_per_slot: how many of each slot's best tokens count.

    Returns:
        [B, N] bool; slots that share a token count once.
    """
    if tokens_per_slot == 1:
        best = attention.argmax(dim=2)  # [B, S]
    else:
        best = attention.topk(tokens_per_slot, dim=2).indices.flatten(1)
    won = torch.zeros(attention.shape[0], attention.shape[2], device=attention.device)
    return won.scatter_(1, best, 1.0) > 0
