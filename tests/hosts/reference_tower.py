"""Vision towers that drop or merge tokens, run by hand: image by image, without any of our code.

T tokens of a tower (the CLS included), N = 16 patches, K rows that are left, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tome_by_hand import naive_rows
from torch import Tensor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def make_pictures(num_images: int, side: int = 4, seed: int = 0) -> Tensor:
    """[I, 3, H, W] of 0 to 255: noise, but for a part of each that is of one colour."""
    random = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (num_images, 3, 14 * side, 14 * side), generator=random)
    for number, picture in enumerate(pictures):
        picture[:, : 14 * (1 + number % side)] = torch.tensor([200, 30, 90])[:, None, None]
    return pictures.float()


def normalised(pictures: Tensor) -> Tensor:
    """What CLIP's image processor makes of them."""
    return (pictures / 255 - MEAN) / STD


def patches_of(picture: Tensor) -> Tensor:
    """[3, H, W] -> [N, 3 P P], colour after colour."""
    rows = [picture[:, y : y + 14] for y in range(0, picture.shape[1], 14)]
    cells = [row[:, :, x : x + 14] for row in rows for x in range(0, picture.shape[2], 14)]
    return torch.stack([cell.flatten() for cell in cells])


def first_states(tower: Any, pixels: Tensor) -> Tensor:
    """[T, D], what goes into the first block."""
    states = tower.embeddings(pixels[None])
    return getattr(tower, "pre_layrnorm", torch.nn.Identity())(states)[0]


def attend(block: Any, states: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of a block: states [T, D], keys [T, H, d] and attention [H, T, T]."""
    attention = block.self_attn
    heads = attention.num_heads
    normed = block.layer_norm1(states)
    queries, keys, values = (
        getattr(attention, f"{name}_proj")(normed).unflatten(1, (heads, -1)) for name in "qkv"
    )
    logits = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[2] ** -0.5
    eager = attention.config._attn_implementation == "eager"
    precise = torch.float32 if eager else states.dtype  # of transformers' own softmax
    logits = logits if bias is None else logits + bias
    weights = logits.softmax(dim=2, dtype=precise).to(states)
    mixed = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
    return states + attention.out_proj(mixed), keys, weights


def finish(block: Any, states: Tensor) -> Tensor:
    """The second half of a block."""
    return states + block.mlp(block.layer_norm2(states))


@torch.no_grad()
def merged_by_hand(
    tower: Any, pixels: Tensor, schedule: Sequence[int], has_cls: bool
) -> tuple[list[int], Tensor]:
    """ToMe in the first blocks: the places of the patches that are left, and their states [K, D].

    Args:
        pixels: [3, H, W].
        schedule: how many tokens each of the blocks merges.
    """
    states = first_states(tower, pixels)
    groups = [[token] for token in range(len(states))]
    for block, r in zip(tower.encoder.layers, schedule, strict=False):
        sizes = torch.tensor([len(group) for group in groups], dtype=states.dtype)
        states, keys, _ = attend(block, states, sizes.log())
        if r:
            rows = naive_rows(keys.mean(dim=1), r, has_cls)
            total = [sum(states[i] * sizes[i] for i in row) / sizes[row].sum() for row in rows]
            states = torch.stack(total)
            groups = [sorted(sum((groups[i] for i in row), [])) for row in rows]
        states = finish(block, states)
    prefix = int(has_cls)
    order = sorted(range(prefix, len(groups)), key=lambda i: groups[i][0])
    return [groups[i][0] - prefix for i in order], states[order]


@torch.no_grad()
def masked_by_hand(
    tower: Any,
    pixels: Tensor,
    num_blocks: int,
    has_cls: bool,
    choose: Callable[[int, Tensor, Tensor | None], Sequence[int] | None],
) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """The whole tower, with what was dropped masked as a key of all later blocks.

    Args:
        pixels: [3, H, W].
        num_blocks: how many run.
        choose: in front of each block, from its number, its states [T, D] and the attention
            [H, T, T] of the block before: the patches that stay, None for no change.

    Returns:
        the patches that stay, and of all T tokens the states [T, D] (layers) and attention
        [H, T, T] (blocks).
    """
    states, weights = first_states(tower, pixels), None
    prefix = int(has_cls)
    kept = list(range(len(states) - prefix))
    layers, attentions = [states], []
    for number, block in enumerate(tower.encoder.layers[:num_blocks]):
        chosen = choose(number, states, weights)
        kept = kept if chosen is None else list(chosen)
        bias = torch.full((len(states),), float("-inf"), dtype=states.dtype)
        bias[list(range(prefix)) + [patch + prefix for patch in kept]] = 0
        states, _, weights = attend(block, states, bias)
        states = finish(block, states)
        layers.append(states)
        attentions.append(weights)
    return kept, layers, attentions
