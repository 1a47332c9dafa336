"""Tokens of no image, to run a pruner's own `select` on, and what hosts compute to fill them.

Numbers are drawn where a choice depends on them, and stand for no image: how many operations a
choice takes depends on sizes alone. V views of an image, N tokens of all of them, T of a block of
the tower (with the CLS, where there is one), M text tokens, D width of the tower, D' of the
language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ocvtp.flops import operations
from ocvtp.flops.formulas import BlockRows, linear, window_lengths
from ocvtp.flops.sizes import ClipSizes, QwenSizes, Sizes
from ocvtp.pruners.layer_pruner import LayerNeeds, LayerPruner
from ocvtp.structures import AttentionKey, LayerTokens, Needs, VisualTokens
from ocvtp.towers import taps
from ocvtp.towers.windows import segment_means

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
        """The next ones, of a shape."""
        return torch.randn(*shape, generator=self._generator)


def blocks(tower: ClipSizes) -> list[torch.nn.Module]:
    """Stand-ins for the blocks of a tower, to count them."""
    return [torch.nn.Identity()] * tower.blocks


def no_modules(block: Any) -> Any:
    """Queries and keys of a stand-in: there are none."""
    raise AssertionError(f"{block} is no block of a tower")


def pixels(tower: ClipSizes) -> VisualTokens:
    """The patches of one view, 0 to 255."""
    values = 64 * Draw()(1, tower.view_tokens, tower.patch_inputs) + 128
    return VisualTokens(values.clamp(0, 255), tower.grid_hw)


def clip_tokens(
    sizes: Sizes,
    needs: Needs,
    rows: Sequence[BlockRows],
    count: int,
    num_views: int,
    text_length: int,
) -> tuple[int, VisualTokens]:
    """What a pruner reads of an image behind a CLIP or SigLIP tower, and what it takes to have it.

    Args:
        sizes: of the model.
        needs: of the pruner.
        rows: T of each block.
        count: N.
        num_views: V.
        text_length: M.
    """
    draw = Draw()
    tower = sizes.tower
    assert isinstance(tower, ClipSizes)
    view = taps.Tower(blocks(tower), tower.heads, no_modules)
    attention: dict[AttentionKey, Tensor] = {}
    total = 0
    for block, kind in needs.attention:
        queries = draw(num_views, rows[view.block(block)].attention, tower.width)
        settings = (tower.heads, kind, tower.prefix, needs.patch_queries)
        operations, mean = counted(partial(taps.attention_mean, queries, queries, *settings))
        total += operations
        attention[block, kind] = mean[:, : count // num_views].reshape(1, count)
    one = draw(1, count, tower.width)
    cls = draw(1, tower.width) if tower.prefix else None
    tokens = VisualTokens(
        features=one.repeat(1, 1, len(tower.layers_read)),
        grid_hw=tower.grid_hw,
        cls=None if cls is None else cls.repeat(1, len(tower.layers_read)),
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
    return total, _with_language(tokens, sizes, needs, text_length)


def qwen_tokens(
    sizes: Sizes, needs: Needs, grid_hw: tuple[int, int], text_length: int
) -> tuple[int, VisualTokens]:
    """What a pruner reads of an image behind Qwen's tower; see `clip_tokens`."""
    draw = Draw()
    tower = sizes.tower
    assert isinstance(tower, QwenSizes)
    count = grid_hw[0] * grid_hw[1]
    patches = draw(count * tower.unit**2, tower.width)
    attention: dict[AttentionKey, Tensor] = {}
    total = 0
    for block, kind in needs.attention:
        number = taps.resolve(block, tower.blocks, "blocks")
        lengths = window_lengths(tower, grid_hw, whole=number in tower.whole)
        ends = [0, *torch.tensor(lengths).cumsum(dim=0).tolist()]
        means = partial(segment_means, patches, patches, tower.heads, kind, ends)
        operations, by_patch = counted(means)
        total += operations
        attention[block, kind] = by_patch.view(1, count, -1).mean(dim=2)
    one = patches[:count][None]
    tokens = VisualTokens(
        features=draw(1, count, sizes.text.width),
        grid_hw=grid_hw,
        hidden=dict.fromkeys(needs.hidden, one),
        attention=attention,
        keys=dict.fromkeys(needs.keys, one),
        num_heads=tower.heads,
    )
    return total, _with_language(tokens, sizes, needs, text_length)


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
        tower: what the vision tower said, where it reads that.
    """
    text, draw = sizes.text, Draw()
    visual, words = draw(1, count, text.width), draw(1, text_length, text.width)
    keys, text_keys = draw(1, count, text.key_width), draw(1, text_length, text.key_width)
    return LayerTokens(
        features=visual,
        grid_hw=(1, count),
        places=torch.arange(count)[None],
        attention={key: draw(1, count).softmax(dim=1) for key in needs.attention},  # type: ignore[misc]
        keys=dict.fromkeys(needs.keys, keys),
        text_keys=dict.fromkeys(needs.keys, text_keys),
        num_heads=text.key_heads,
        text=words if needs.text else None,
        text_valid=torch.ones(1, text_length, dtype=torch.bool),
        normed=dict.fromkeys(needs.normed, visual),
        text_normed=dict.fromkeys(needs.normed, words) if needs.text else {},
        tower=tower,
    )


def layer_reads(sizes: Sizes, needs: LayerNeeds, number: int, count: int, text_length: int) -> int:
    """Operations of what hosts compute for a choice in front of layer `number`.

    A score is one product of its query rows with the keys; for one of the coming layer these are
    projected too.
    """
    text, prompt, total = sizes.text, count + text_length, 0
    for layer, kind in needs.attention:
        asking = {"last": 1, "text": text_length, "visual": count}[kind]
        asked = count if kind == "visual" else prompt
        total += linear(asking, text.query_width, asked)
        total += linear(1, asking, count) if kind == "text" else 0
        if layer == number:
            total += linear(asking, text.width, text.query_width)
            total += linear(prompt, text.width, text.key_width)
    coming = sum(layer == number for layer in needs.keys)
    return total + coming * linear(prompt, text.width, text.key_width)


def raters(pruner: LayerPruner, sizes: Sizes, count: int, text_length: int) -> int:
    """Operations of choosing the words that ask, where any stage reads what words attend to."""
    layers = pruner.layers(sizes.text.layers)
    kinds = {kind for layer in layers for _, kind in pruner.needs_at(layer).attention}
    if "text" not in kinds:
        return 0
    tokens = layer_tokens(sizes, LayerNeeds(text=True), count, text_length)
    return counted(partial(pruner.raters, tokens))[0]


def _with_language(
    tokens: VisualTokens, sizes: Sizes, needs: Needs, text_length: int
) -> VisualTokens:
    draw, count, width = Draw(), tokens.num_tokens, sizes.text.width
    return replace(
        tokens,
        projected=draw(1, count, width) if needs.projected else None,
        text=draw(1, text_length, width) if needs.text else None,
        text_valid=torch.ones(1, text_length, dtype=torch.bool) if needs.text else None,
    )
