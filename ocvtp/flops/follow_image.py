"""What an image costs in front of the language model, and how many of its tokens each layer reads.

V views of an image, N patches of one, T rows of a block, K kept, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from ocvtp.flops import dummy_tokens, formulas
from ocvtp.flops.dummy_tokens import Draw, counted
from ocvtp.flops.formulas import BlockRows, linear
from ocvtp.flops.sizes import ClipSizes, QwenSizes, Sizes
from ocvtp.hosts.base import Savings
from ocvtp.hosts.in_tower import skip_unread
from ocvtp.hosts.in_tower.stages import first_block
from ocvtp.pruners import Compose, Pruner
from ocvtp.pruners.block_merger import BlockMerger
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.structures import Needs, Selection, VisualTokens
from ocvtp.towers import taps


@dataclass
class Image:
    """One image on its way through a model.

    Args:
        sizes: of the model. text_length: see `Count`. savings: what is left out.
        needs: of what reads the vision tower behind its own stages.
        num_views: V.
        left: tokens of it that are left so far.
        rows: of each block of a CLIP or SigLIP tower.
        tower, projector, select: operations so far, see `Count`.
        visual: of each layer of the language model, the tokens that it reads.
    """

    sizes: Sizes
    text_length: int
    savings: Savings
    needs: Needs
    num_views: int
    left: int
    rows: list[BlockRows] = field(default_factory=list)
    tower: int = 0
    projector: int = 0
    select: int = 0
    visual: tuple[int, ...] = ()

    def choose(self, part: Pruner, tokens: VisualTokens, times: int = 1) -> int:
        """Let a pruner choose, so many times; returns K."""
        operations, selection = counted(partial(part.select, tokens))
        self.select += times * (operations + _mixing(tokens, selection))
        return selection.keep_indices.shape[1]


def follow(
    sizes: Sizes,
    pruner: Pruner | Compose | None,
    num_tokens: int,
    text_length: int,
    savings: Savings,
    num_newlines: int = 0,
) -> Image:
    """Follow one image through the model.

    Args:
        sizes: of the model.
        pruner: None for none.
        num_tokens: of the image before pruning, V N.
        text_length: tokens of the prompt that are none of the image's.
        savings: what is left out where nobody reads it.
        num_newlines: rows of the image that are no tokens of the tower.

    Raises:
        ValueError: see `ocvtp.flops.count`.
    """
    parts: dict[str, Pruner] = {}
    for part in () if pruner is None else pruner.parts:
        parts[part.stage] = part
        if not part.exact:
            raise ValueError(
                f"how many tokens {part.name!r} keeps hangs on what is in the image; give it"
                " num_keep or keep_ratio, without adaptive."
            )
    needs = Needs() if pruner is None else pruner.tower_needs
    tower, views = sizes.tower, 1
    if isinstance(tower, ClipSizes):
        views, rest = divmod(num_tokens, tower.view_tokens)
        if rest or not views:
            raise ValueError(
                f"num_visual={num_tokens}; this model makes {tower.view_tokens} tokens of an image"
                f" or tile: pass a multiple of {tower.view_tokens}."
            )
        _check_tiles(parts, views)
    image = Image(sizes, text_length, savings, needs, views, num_tokens)
    run = _behind_clip if isinstance(tower, ClipSizes) else _behind_qwen
    tokens = run(image, parts)
    image.left += num_newlines
    _inside(image, parts.get("llm_layers"), tokens)
    return image


def _behind_clip(image: Image, parts: Mapping[str, Pruner]) -> VisualTokens:
    """Tower, choice and projector; returns what pruners read of the tower."""
    sizes, tower = image.sizes, image.sizes.tower
    assert isinstance(tower, ClipSizes)
    view = taps.Tower(dummy_tokens.blocks(tower), tower.heads, dummy_tokens.no_modules)
    readers = [image.needs]
    per_view = tower.view_tokens
    if (part := parts.get("pixels")) is not None:
        pixels = dummy_tokens.pixels(tower)
        per_view = image.choose(part, pixels, image.num_views)
    image.rows = [BlockRows.equal(per_view + tower.prefix)] * tower.blocks
    inside = parts.get("encoder")
    if isinstance(inside, BlockMerger):
        per_view = _merge(image, tower, inside, per_view)
    elif inside is not None:
        readers.append(inside.needs)
        per_view = _drop(image, tower, inside, first_block(inside, view))
    image.left = image.num_views * per_view
    halves = 2 * tower.blocks
    if image.savings.cut_tower:
        read = [_with_selected(needs, tower) for needs in readers]
        halves = min(halves, skip_unread.first_unread(view, tower.layers_read, read))
    image.tower = image.num_views * formulas.clip_tower(tower, image.rows, halves)
    reads, tokens = dummy_tokens.clip_tokens(
        sizes, image.needs, image.rows, image.left, image.num_views, image.text_length
    )
    image.select += reads
    everything = image.num_views * tower.view_tokens
    rows, part = everything, parts.get("llm_input")
    if part is not None:
        image.left = image.choose(part, tokens)
    if image.savings.project_kept and not image.needs.projected:
        rows = image.left
    elif part is not None and part.merging:  # mixtures are projected beside all tokens
        rows = everything + image.left
    image.projector = formulas.clip_projector(tower, sizes.text.width, rows)
    return tokens


def _check_tiles(parts: Mapping[str, Pruner], num_views: int) -> None:
    """Refuse a budget of an image where a pruner sees its tiles one by one, as hosts do."""
    for stage in ("pixels", "encoder"):
        part = parts.get(stage)
        if num_views > 1 and part is not None and part.num_keep is not None:
            raise ValueError(
                f"{part.name!r} acts in the vision tower, on one tile at a time, so that"
                f" num_keep={part.num_keep} cannot be that of an image; pass keep_ratio."
            )


def _behind_qwen(image: Image, parts: Mapping[str, Pruner]) -> VisualTokens:
    """See `_behind_clip`."""
    sizes, tower = image.sizes, image.sizes.tower
    assert isinstance(tower, QwenSizes)
    if unserved := parts.keys() & {"pixels", "encoder"}:
        raise ValueError(
            f"pruners of stage {' and '.join(sorted(unserved))} do not go with Qwen's towers; pass"
            " one of stage llm_input or llm_layers."
        )
    rows = next(n for n in range(math.isqrt(image.left), 0, -1) if image.left % n == 0)
    grid_hw = (rows, image.left // rows)
    image.tower = formulas.qwen_tower(tower, grid_hw)
    image.projector = formulas.qwen_merger(tower, sizes.text.width, image.left)
    reads, tokens = dummy_tokens.qwen_tokens(sizes, image.needs, grid_hw, image.text_length)
    image.select += reads
    if (part := parts.get("llm_input")) is not None:
        image.left = image.choose(part, tokens)
    return tokens


def _inside(image: Image, part: Pruner | None, tower: VisualTokens) -> None:
    """The layers of the language model."""
    sizes, count = image.sizes, image.sizes.text.layers
    keeps: dict[int, int] = {}
    if part is not None:
        assert isinstance(part, LayerPruner)
        part.layers(count)  # refuses layers that are not there
        keeps = {stage.layer: stage.num_keep for stage in part.schedule(count, image.left)}
        image.select += dummy_tokens.raters(part, sizes, image.left, image.text_length)
        known = None if part.tower_needs == Needs() else tower
    visual = []
    for number in range(count):
        if part is not None and number in keeps:
            assert isinstance(part, LayerPruner)
            needs = part.needs_at(number)
            tokens = dummy_tokens.layer_tokens(sizes, needs, image.left, image.text_length, known)
            image.select += dummy_tokens.layer_reads(
                sizes, needs, number, image.left, image.text_length
            )
            operations, selection = counted(partial(part.select_at, tokens, number, keeps[number]))
            image.select += operations + _mixing(tokens, selection)
            image.left = selection.keep_indices.shape[1]
        visual.append(image.left)
    image.visual = tuple(visual)


def _merge(image: Image, tower: ClipSizes, part: BlockMerger, per_view: int) -> int:
    """Merge in blocks up to the layer that is read; returns what is left of a view."""
    num_read = max(tower.layers_read)
    merges = part.schedule(per_view, tower.blocks, num_read)
    left, rows = per_view + tower.prefix, []
    for number, merged in enumerate(merges):
        rows.append(BlockRows(left, left - merged))
        runs = number < num_read or not image.savings.cut_tower
        if merged and runs:
            keys = Draw()(1, left, tower.width)
            settings = (tower.heads, merged, tower.prefix == 1)
            operations, _ = counted(partial(part.rows, keys, *settings))
            image.select += image.num_views * operations
        left -= merged
    image.rows = rows
    return rows[num_read - 1].mlp - tower.prefix


def _drop(image: Image, tower: ClipSizes, part: Pruner, at: int) -> int:
    """Drop in front of block `at`; returns what is left of a view."""
    per_view = image.rows[0].mlp - tower.prefix
    reads, tokens = dummy_tokens.clip_tokens(image.sizes, part.needs, image.rows, per_view, 1, 1)
    image.select += image.num_views * reads
    left = image.choose(part, tokens, image.num_views)
    image.rows[at:] = [BlockRows.equal(left + tower.prefix)] * (tower.blocks - at)
    return left


def _with_selected(needs: Needs, tower: ClipSizes) -> Needs:
    """Needs of a tower alone; the CLS is read of the selected layer."""
    return needs | Needs(hidden=tower.layers_read if needs.cls else ())


def _mixing(tokens: VisualTokens, selection: Selection) -> int:
    """Operations of mixing tokens where a pruner merges."""
    if selection.merge is None:
        return 0
    rows = tokens.num_tokens + (tokens.cls is not None)
    return linear(selection.merge.shape[1], rows, tokens.features.shape[2])
