"""Tokens of no image, to run a pruner's own `select` on, and what hosts compute to fill them.

Numbers are random where a choice depends on them: how many operations a choice takes depends on
sizes alone. V views of an image, N tokens of all of them, T of a block of the tower (with the CLS,
where there is one).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ocvtp.flops import operations
from ocvtp.flops.formulas import BlockRows, decode_step, linear
from ocvtp.flops.sizes import Sizes
from ocvtp.pruners.layer_pruner import LayerNeeds, LayerPruner
from ocvtp.structures import AttentionKey, LayerTokens, Needs, VisualTokens
from ocvtp.towers import taps

_T = TypeVar("_T")


def counted(function: Callable[[], _T]) -> tuple[int, _T]:
    """Operations of the products, convolutions and attention inside a call, and its result.

    Sorting, distances by `cdist`, softmax and the like count nothing.
    """
    with operations.counter() as counter, torch.no_grad():
        result = function()
    return int(counter.get_total_flops()), result


class Draw:
    """Normal numbers of one seed."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """The next numbers, in a shape."""
        return torch.randn(*shape, generator=self._generator)


def pooling(sizes: Sizes, length: int) -> int:
    """Operations of a head that pools what a tower gives (SigLIP); the language model reads it not.

    Args:
        sizes: of the model. length: T of the last block.
    """
    if (head := getattr(sizes.host.tower, "head", None)) is None:
        return 0
    weight = next(head.parameters())
    states = torch.empty(1, length, sizes.tower.width, dtype=weight.dtype, device=weight.device)
    return counted(partial(head, states))[0]


def pixels(sizes: Sizes, grid_hw: tuple[int, int]) -> VisualTokens:
    """The patches of one view, 0 to 255."""
    values = 64 * Draw()(1, math.prod(grid_hw), sizes.tower.patch_inputs) + 128
    return VisualTokens(values.clamp(0, 255), grid_hw)


def tower_tokens(
    sizes: Sizes,
    needs: Needs,
    grid_hw: tuple[int, int],
    rows: Sequence[BlockRows],
    count: int,
    num_views: int,
    text_length: int,
) -> tuple[int, VisualTokens]:
    """What a pruner reads of an image after the vision tower, and what that costs.

    Args:
        sizes: of the model.
        needs: of the pruner.
        grid_hw: rows and columns of a view.
        rows: T of each block.
        count: N.
        num_views: V.
        text_length: M.
    """
    draw, tower, prefix = Draw(), sizes.tower, sizes.host.num_prefix
    attention: dict[AttentionKey, Tensor] = {}
    total = 0
    for block, kind in needs.attention:
        found = []
        for length, times in Counter(
            rows[taps.resolve(block, len(rows), "blocks")].attention
        ).items():
            queries = draw(num_views * times, length, tower.width)
            settings = (tower.heads, kind, prefix, needs.patch_queries)
            operations, mean = counted(partial(taps.attention_mean, queries, queries, *settings))
            total += operations
            found.append(mean.flatten())
        attention[block, kind] = torch.cat(found)[None, :count]
    one = draw(1, count, tower.width)
    cls = draw(1, tower.width) if prefix else None
    tokens = VisualTokens(
        features=draw(1, count, tower.features),
        grid_hw=grid_hw,
        cls=None if cls is None else draw(1, tower.features),
        hidden=dict.fromkeys(needs.hidden, one),
        attention=attention,
        keys=dict.fromkeys(needs.keys, one),
        cls_keys={} if cls is None else dict.fromkeys(needs.keys, cls),
        cls_queries={} if cls is None else dict.fromkeys(needs.keys, cls),
        num_heads=tower.heads,
    )
    if needs.clip:
        total += linear(count, tower.width, tower.shared_width)
        parts = draw(1, 1, tower.shared_width)
        visual = draw(1, count, tower.shared_width)
        tokens = replace(tokens, clip_visual=visual, clip_text=parts)
    width = sizes.text.width
    return total, replace(
        tokens,
        projected=draw(1, count, width) if needs.projected else None,
        text=draw(1, text_length, width) if needs.text else None,
        text_valid=torch.ones(1, text_length, dtype=torch.bool) if needs.text else None,
    )


def layer_tokens(
    sizes: Sizes,
    needs: LayerNeeds,
    count: int,
    text_length: int,
    tower: VisualTokens | None = None,
) -> LayerTokens:
    """What a pruner reads of an image of N = `count` tokens inside the language model.

    Args:
        sizes: of the model. needs: of the pruner there. count: N. text_length: M.
        tower: what the vision tower gave, where the pruner reads that.
    """
    text, draw = sizes.text, Draw()
    visual, words = draw(1, count, text.width), draw(1, text_length, text.width)
    keys, text_keys = draw(1, count, text.key_width), draw(1, text_length, text.key_width)
    return LayerTokens(
        features=visual,
        grid_hw=(1, count),
        places=torch.arange(count)[None],
        attention={
            key: draw(1, count, *[text.heads] * (key[1] == "last_heads")).softmax(dim=1)  # type: ignore[misc]
            for key in needs.attention
        },
        keys=dict.fromkeys(needs.keys, keys),
        text_keys=dict.fromkeys(needs.keys, text_keys),
        num_heads=text.key_heads,
        text=words if needs.text else None,
        text_valid=torch.ones(1, text_length, dtype=torch.bool),
        normed=dict.fromkeys(needs.normed, visual),
        text_normed=dict.fromkeys(needs.normed, words) if needs.text else {},
        tower=tower,
        column=lambda vectors: draw(1, count, text.heads).softmax(dim=1),
    )


def layer_reads(sizes: Sizes, needs: LayerNeeds, number: int, count: int, text_length: int) -> int:
    """Operations of what hosts compute for a choice before layer `number`.

    A score is one product of its query rows with the keys; for one of the coming layer these are
    projected too. A column of the pruner's own takes a decode step of every layer before.
    """
    text, prompt, total = sizes.text, count + text_length, 0
    for layer, kind in needs.attention:
        asking = {"last": 1, "last_heads": 1, "text": text_length, "visual": count}[kind]
        asked = count if kind == "visual" else prompt
        total += linear(asking, text.query_width, asked)
        total += linear(1, asking, count) if kind == "text" else 0
        if layer == number:
            total += linear(asking, text.width, text.query_width)
            total += linear(prompt, text.width, text.key_width)
    if needs.column is not None:
        total += needs.column * decode_step(text, prompt + 1)
        total += linear(1, text.width, text.query_width + text.key_width)
        total += linear(1, text.query_width, prompt + 1)
    coming = sum(layer == number for layer in (*needs.keys, needs.column))
    return total + coming * linear(prompt, text.width, text.key_width)


def raters(pruner: LayerPruner, sizes: Sizes, count: int, text_length: int) -> int:
    """Operations of choosing the words whose attention a stage reads."""
    layers = pruner.layers(sizes.text.layers)
    kinds = {kind for layer in layers for _, kind in pruner.needs_at(layer).attention}
    if "text" not in kinds:
        return 0
    tokens = layer_tokens(sizes, LayerNeeds(text=True), count, text_length)
    return counted(partial(pruner.raters, tokens))[0]
