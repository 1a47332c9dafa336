"""Many questions on one image in one pass of the language model, and fewer of its tokens.

All questions share the image before them and none sees another: a block mask, and positions that
start again with every question. A question is read as if it stood alone. Q questions of L words,
P words before the image, H width of the language model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LEAST_KEPT, MOST_KEPT = 1 / 24, 3 / 4
_MOST_BIAS = 3.0


def read_packed(
    model: Any,
    before: Tensor,
    visual: Tensor,
    words: Tensor,
    places: tuple[Tensor, int] | None = None,
) -> Tensor:
    """What the language model makes of every word of every question.

    Args: those of `pack`.

    Returns:
        [B, Q, L, H] last hidden states.
    """
    inputs, shared = pack(model, before, visual, words, places)
    hidden: Tensor = model.model.language_model(**inputs).last_hidden_state
    own: Tensor = hidden[:, shared:].unflatten(1, words.shape[1:])
    return own


def pack(
    model: Any,
    before: Tensor,
    visual: Tensor,
    words: Tensor,
    places: tuple[Tensor, int] | None = None,
) -> tuple[dict[str, Any], int]:
    """What the language model is called with.

    Args:
        model: a LlavaForConditionalGeneration.
        before: [P] token numbers before the image.
        visual: [B, K, H] projected tokens, at the positions P to P + K - 1.
        words: [B, Q, L] token numbers.
        places: [B, K] which of so many places each visual token is at, so that positions have gaps
            where tokens were left out.

    Returns:
        Its arguments, of P + K + Q L tokens, and the number of those before the questions.
    """
    batch, num_questions, length = words.shape
    embed = model.get_input_embeddings()
    start = embed(before).expand(batch, -1, -1)
    inputs = torch.cat([start, visual.to(start.dtype), embed(words.flatten(1))], dim=1)
    shared = start.shape[1] + visual.shape[1]
    own = torch.arange(num_questions, device=words.device).repeat_interleave(length)
    block = torch.cat([own.new_full((shared,), -1), own])  # -1: what all questions see
    order = torch.arange(len(block), device=words.device)
    seen = (order[:, None] >= order) & ((block < 0) | (block[:, None] == block))
    positions = torch.cat([order[:shared], shared + (order[shared:] - shared) % length])
    positions = positions.expand(batch, -1)
    if places is not None:
        own_places, num_places = places
        start_of_image = start.shape[1]
        shown = slice(start_of_image, shared)
        positions = positions + (num_places - visual.shape[1]) * (order >= shared)
        positions[:, shown] = start_of_image + own_places
    arguments = {
        "inputs_embeds": inputs,
        "attention_mask": seen[None, None].expand(batch, 1, -1, -1),
        "position_ids": positions,
        "use_cache": False,
    }
    return arguments, shared


def random_subset(features: Tensor, generator: torch.Generator) -> Tensor:
    """Which tokens stay: some number of them, drawn towards a random direction of the features.

    The number is the same for all images, log-uniform in N / 24 to 3 N / 4. The strength of the
    pull is uniform in 0 to 3, so that subsets are anything from uniform to one-sided, as those of
    pruners are. No pruner takes part.

    Args:
        features: [B, N, D], standardised.
        generator: of a CPU.

    Returns:
        [B, K] ascending.
    """
    batch, num_tokens, dim = features.shape
    share, strength = torch.rand(2, generator=generator).tolist()
    least, most = math.log(LEAST_KEPT), math.log(MOST_KEPT)
    num_keep = max(1, round(num_tokens * math.exp(least + share * (most - least))))
    direction = torch.randn(dim, generator=generator).to(features)
    noise = torch.randn(batch, num_tokens, generator=generator).to(features)
    along = features @ direction
    along = (along - along.mean(1, keepdim=True)) / (along.std(1, keepdim=True) + 1e-6)
    score = noise + _MOST_BIAS * strength * along
    keep: Tensor = score.topk(num_keep, dim=1).indices.sort(dim=1).values
    return keep
