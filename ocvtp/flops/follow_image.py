"""What an image costs before the language model, and how many of its tokens each layer reads.

V views of an image, N patches of one, T rows of a block, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from ocvtp.flops import dummy_tokens, formulas
from ocvtp.flops.dummy_tokens import Draw, counted
from ocvtp.flops.formulas import BlockRows, linear
from ocvtp.flops.sizes import Sizes, TowerSizes
from ocvtp.hosts.base import Savings
from ocvtp.hosts.in_tower import skip_unread
from ocvtp.hosts.in_tower.stages import first_block
from ocvtp.hosts.prompt.checks import beyond
from ocvtp.hosts.registry import check
from ocvtp.pruners import Compose, Pruner
from ocvtp.pruners.block_merger import BlockMerger
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.structures import Needs, Selection, VisualTokens


@dataclass
class Image:
    """One image that is followed through a model.

    Args:
        sizes: of the model. text_length: see `Count`. savings: what is left out.
        needs: of what reads the vision tower after its own stages.
        num_views: V. grid_hw: rows and columns of a view's tokens.
        left: tokens of it that are left so far.
        rows: of each block of the tower.
        tower, projector, select: operations so far, see `Count`.
        visual: of each layer of the language model, the tokens that it reads.
    """

    sizes: Sizes
    text_length: int
    savings: Savings
    needs: Needs
    num_views: int
    grid_hw: tuple[int, int]
    left: int
    rows: list[BlockRows] = field(default_factory=list)
    tower: int = 0
    projector: int = 0
    select: int = 0
    visual: tuple[int, ...] = ()

    def tokens(
        self, needs: Needs, count: int, num_views: int, text_length: int
    ) -> tuple[int, VisualTokens]:
        """Operations of what is read after the tower, and what it is; see `tower_tokens`."""
        sizes = (count, num_views, text_length)
        return dummy_tokens.tower_tokens(self.sizes, needs, self.grid_hw, self.rows, *sizes)

    def choose(
        self, part: Pruner, tokens: VisualTokens, times: int = 1, rows_of_each: int = 1
    ) -> int:
        """Let a pruner choose, so many times; returns K.

        Args:
            part: the pruner. tokens: what it sees. times: how often.
            rows_of_each: rows of a token that are mixed where the pruner merges.
        """
        operations, selection = counted(partial(part.select, tokens))
        self.select += times * (operations + rows_of_each * _mixing(tokens, selection))
        return selection.keep_indices.shape[1]


def follow(
    sizes: Sizes,
    pruner: Pruner | Compose | None,
    num_tokens: int,
    text_length: int,
    savings: Savings,
    num_apart: int = 0,
) -> Image:
    """Follow one image through the model.

    Args:
        sizes: of the model.
        pruner: None for none.
        num_tokens: of the image before pruning, V N.
        text_length: tokens of the prompt that are none of the image's.
        savings: what is left out where nobody reads it.
        num_apart: rows of the image that are no tokens of the tower.

    Raises:
        ValueError: see `ocvtp.flops.count`.
    """
    parts: dict[str, Pruner] = {}
    for part in () if pruner is None else pruner.parts:
        parts[part.stage] = part
        if not part.exact:
            raise ValueError(
                f"how many tokens {part.name!r} keeps hangs on what is in the image; give it"
                " num_keep, keep_ratio or max_keep, without adaptive and quality."
            )
    if pruner is not None:
        check(sizes.host, pruner)
        if why := beyond(num_tokens, pruner, "the image has"):
            raise ValueError(why)
    needs = Needs() if pruner is None else pruner.tower_needs
    views, grid_hw = _views(sizes, num_tokens)
    _check_tiles(parts, views)
    image = Image(sizes, text_length, savings, needs, views, grid_hw, num_tokens)
    tokens = _before_language_model(image, parts)
    image.left += num_apart
    _inside(image, parts.get("llm_layers"), tokens)
    return image


def _views(sizes: Sizes, num_tokens: int) -> tuple[int, tuple[int, int]]:
    """V of an image, and rows and columns of one: nearly square where images have any shape."""
    if (grid_hw := sizes.host.grid_hw) is None:
        rows = next(n for n in range(math.isqrt(num_tokens), 0, -1) if num_tokens % n == 0)
        return 1, (rows, num_tokens // rows)
    per_view = math.prod(grid_hw)
    views, rest = divmod(num_tokens, per_view)
    if rest or not views:
        raise ValueError(
            f"num_visual={num_tokens}; this model makes {per_view} tokens of an image or tile: pass"
            f" a multiple of {per_view}."
        )
    return views, grid_hw


def _before_language_model(image: Image, parts: Mapping[str, Pruner]) -> VisualTokens:
    """Tower, choice and projector; returns what pruners read of the tower."""
    sizes, host, tower = image.sizes, image.sizes.host, image.sizes.tower
    view, readers = host.tower_parts(), [image.needs]
    per_view = math.prod(image.grid_hw)
    patches = per_view * host.unit_side**2
    image.rows = [
        BlockRows((lengths[0] + host.num_prefix, *lengths[1:]), patches + host.num_prefix)
        for lengths in (host.segments(n, image.grid_hw) for n in range(len(tower.blocks)))
    ]
    if (part := parts.get("pixels")) is not None:
        pixels = dummy_tokens.pixels(sizes, image.grid_hw)
        per_view = image.choose(part, pixels, image.num_views)
        image.rows = [BlockRows.equal(per_view + host.num_prefix)] * len(tower.blocks)
    inside = parts.get("encoder")
    if isinstance(inside, BlockMerger):
        per_view = _merge(image, inside, per_view)
    elif inside is not None:
        readers.append(inside.needs)
        per_view = _drop(image, inside, first_block(inside, view))
    image.left = image.num_views * per_view
    halves = 2 * len(tower.blocks)
    if image.savings.cut_tower:
        read = [_with_selected(needs, tower) for needs in readers]
        halves = min(halves, skip_unread.first_unread(view, tower.layers_read, read))
    image.tower = image.num_views * formulas.tower(tower, patches, image.rows, halves)
    if not image.savings.cut_tower:
        image.tower += image.num_views * dummy_tokens.pooling(sizes, image.rows[-1].mlp)
    reads, tokens = image.tokens(image.needs, image.left, image.num_views, image.text_length)
    image.select += reads
    everything = rows = image.num_views * math.prod(image.grid_hw)
    part = parts.get("llm_input")
    if part is not None:
        image.left = image.choose(part, tokens, rows_of_each=1 + host.num_deepstack_layers)
    if not host.features_are_projected:
        if image.savings.project_kept and not image.needs.projected:
            rows = image.left
        elif part is not None and part.merging:  # mixtures are projected besides all tokens
            rows = everything + image.left
    image.projector = linear(rows + host.num_registers, tower.projector, 1)
    return tokens


def _check_tiles(parts: Mapping[str, Pruner], num_views: int) -> None:
    """Refuse a budget of an image where a pruner sees its tiles one by one; hosts do so too."""
    for stage in ("pixels", "encoder"):
        part = parts.get(stage)
        if num_views > 1 and part is not None and (name := part.counts_by) is not None:
            raise ValueError(
                f"{part.name!r} acts in the vision tower, on one tile at a time, so that"
                f" {name}={getattr(part, name)} cannot be that of an image; pass keep_ratio."
            )


def _inside(image: Image, part: Pruner | None, tower: VisualTokens) -> None:
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


def _merge(image: Image, part: BlockMerger, per_view: int) -> int:
    """Merge in blocks up to the layer that is read; returns what is left of a view."""
    tower, prefix = image.sizes.tower, image.sizes.host.num_prefix
    num_read = max(tower.layers_read)
    merges = part.schedule(per_view, len(tower.blocks), num_read)
    left, rows = per_view + prefix, []
    for number, merged in enumerate(merges):
        rows.append(BlockRows((left,), left - merged))
        runs = number < num_read or not image.savings.cut_tower
        if merged and runs:
            keys = Draw()(1, left - max(prefix - 1, 0), tower.width)
            operations, _ = counted(partial(part.rows, keys, tower.heads, merged, prefix > 0))
            image.select += image.num_views * operations
        left -= merged
    image.rows = rows
    return rows[num_read - 1].mlp - prefix


def _drop(image: Image, part: Pruner, at: int) -> int:
    """Drop before block `at`; returns what is left of a view."""
    prefix = image.sizes.host.num_prefix
    reads, tokens = image.tokens(part.needs, image.rows[0].mlp - prefix, 1, 1)
    image.select += image.num_views * reads
    left = image.choose(part, tokens, image.num_views)
    image.rows[at:] = [BlockRows.equal(left + prefix)] * (len(image.rows) - at)
    return left


def _with_selected(needs: Needs, tower: TowerSizes) -> Needs:
    """Needs of a tower alone; the CLS is that of the selected layer."""
    return needs | Needs(hidden=tower.layers_read if needs.cls else ())


def _mixing(tokens: VisualTokens, selection: Selection) -> int:
    if selection.merge is None:
        return 0
    rows = tokens.num_tokens + (tokens.cls is not None)
    return linear(selection.merge.shape[1], rows, tokens.features.shape[2])
