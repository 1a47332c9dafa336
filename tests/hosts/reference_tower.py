"""Vision towers that drop or merge tokens, run by hand: image by image, without any of our code.

T tokens of a tower (the CLS included), N = 16 patches, K rows that are left, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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


def blocks_of(tower: Any) -> Any:
    """The blocks of a tower."""
    encoder = tower.encoder if hasattr(tower, "encoder") else tower.model
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


def queries_and_keys(tower: Any, block: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """[I, T, D] those that a block projects of its input, before they are turned."""
    layer = blocks_of(tower)[block]
    if hasattr(layer, "layer_norm1"):
        states, own = layer.layer_norm1(states), layer.self_attn
    else:
        states, own = layer.norm1(states), layer.attention
    if hasattr(own, "q_proj"):
        return own.q_proj(states), own.k_proj(states)
    return own.attention.query(states), own.attention.key(states)  # older DINOv2


def prefix_of(tower: Any) -> int:
    """Tokens before the patches."""
    has_cls = "siglip" not in tower.config.model_type
    return has_cls + getattr(tower.config, "num_register_tokens", 0)


def turned(tower: Any, pixels: Tensor, places: Sequence[int], heads: Tensor) -> Tensor:
    """[T, H, d] turned by rows and columns, where the tower does that, of patches at `places`."""
    if not hasattr(tower, "rope_embeddings"):
        return heads
    first, size = prefix_of(tower), heads.shape[2] // 4
    side = pixels.shape[1] // 14
    turns = heads.clone()
    for token, place in enumerate(places, start=first):
        for part in range(2 * size):  # the rows' angles, then the columns'
            center = ((place // side, place % side)[part // size] + 0.5) / side * 2 - 1
            speed = tower.config.rope_theta ** (-(part % size) / size)
            angle = torch.tensor(2 * torch.pi * center * speed, dtype=heads.dtype)
            one, other = heads[token, :, part], heads[token, :, part + 2 * size]
            turns[token, :, part] = one * angle.cos() - other * angle.sin()
            turns[token, :, part + 2 * size] = other * angle.cos() + one * angle.sin()
    return turns


def attend(
    tower: Any,
    number: int,
    states: Tensor,
    bias: Tensor | None = None,
    turn: Callable[[Tensor], Tensor] = lambda heads: heads,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of a block: states [T, D], keys [T, H, d] and attention [H, T, T]."""
    block, heads = blocks_of(tower)[number], tower.config.num_attention_heads
    is_clip = hasattr(block, "self_attn")
    attention = block.self_attn if is_clip else block.attention
    normed = (block.layer_norm1 if is_clip else block.norm1)(states)
    queries, keys, values = (
        getattr(attention, f"{name}_proj")(normed).unflatten(1, (heads, -1)) for name in "qkv"
    )
    logits = torch.einsum("qhd,khd->hqk", turn(queries), turn(keys)) * queries.shape[2] ** -0.5
    eager = is_clip and attention.config._attn_implementation == "eager"
    precise = torch.float32 if eager else states.dtype  # of transformers' own softmax
    logits = logits if bias is None else logits + bias
    weights = logits.softmax(dim=2, dtype=precise).to(states)
    mixed = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
    if is_clip:
        return states + attention.out_proj(mixed), keys, weights
    return states + block.drop_path(block.layer_scale1(attention.o_proj(mixed))), keys, weights


def finish(tower: Any, number: int, states: Tensor) -> Tensor:
    """The second half of a block."""
    block = blocks_of(tower)[number]
    if hasattr(block, "layer_norm2"):
        return states + block.mlp(block.layer_norm2(states))
    return states + block.drop_path(block.layer_scale2(block.mlp(block.norm2(states))))


@torch.no_grad()
def merged_by_hand(
    tower: Any, pixels: Tensor, schedule: Sequence[int], has_cls: bool
) -> tuple[list[int], Tensor]:
    """ToMe in the first blocks: the places of the patches that are left, and their states [K, D].

    Registers come before these.

    Args:
        pixels: [3, H, W].
        schedule: how many tokens each of the blocks merges.
    """
    states = first_states(tower, pixels)
    groups = [[token] for token in range(len(states))]
    prefix = prefix_of(tower)
    apart = max(prefix - 1, 0)  # the last token before the patches stays alone, as a CLS does
    for number, r in enumerate(schedule):
        sizes = torch.tensor([len(group) for group in groups], dtype=states.dtype)
        places = [group[0] - prefix for group in groups[prefix:]]
        turn = partial(turned, tower, pixels, places)
        states, keys, _ = attend(tower, number, states, sizes.log(), turn)
        if r:
            rows = naive_rows(keys[apart:].mean(dim=1), r, has_cls)
            rows = [[i] for i in range(apart)] + [[i + apart for i in row] for row in rows]
            total = [sum(states[i] * sizes[i] for i in row) / sizes[row].sum() for row in rows]
            states = torch.stack(total)
            groups = [sorted(sum((groups[i] for i in row), [])) for row in rows]
        states = finish(tower, number, states)
    order = sorted(range(prefix, len(groups)), key=lambda i: groups[i][0])
    return [groups[i][0] - prefix for i in order], states[[*range(1, prefix), *order]]


@torch.no_grad()
def masked_by_hand(
    tower: Any,
    pixels: Tensor,
    num_blocks: int,
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
    prefix = prefix_of(tower)
    kept = list(range(len(states) - prefix))
    turn = partial(turned, tower, pixels, kept)
    layers, attentions = [states], []
    for number in range(num_blocks):
        chosen = choose(number, states, weights)
        kept = kept if chosen is None else list(chosen)
        bias = torch.full((len(states),), float("-inf"), dtype=states.dtype)
        bias[list(range(prefix)) + [patch + prefix for patch in kept]] = 0
        states, _, weights = attend(tower, number, states, bias, turn)
        states = finish(tower, number, states)
        layers.append(states)
        attentions.append(weights)
    return kept, layers, attentions
