"""From what a tower gave to the rows that a language model reads of every image.

T tiles (or images) of a call, N tokens of each, n tokens of a view, V views of a call.

Views of equal size and budget are chosen from together, without padding, and nothing waits for the
device: how many tokens stay is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.families.tiles import TokenMap, with_ends
from ocvtp.ops.merging import merge
from ocvtp.ops.token_views import seen_of_tiles
from ocvtp.pruners import Pruner
from ocvtp.serving.plan import Plan
from ocvtp.structures import Selection, VisualTokens, take

Project = Callable[[Tensor], Tensor]
"""[..., D] -> [..., D'], the model's own projector."""


@dataclass(frozen=True)
class View:
    """One view of an image, and how many of its tokens are asked for; tensors are on the CPU.

    Args:
        index: [n] its tokens, counted over the T N tokens of the call.
        places: [n] the rows of the image that these would be, ascending.
        tile: whose CLS speaks for it.
        asked: K; more than n leaves the view as it is.
    """

    index: Tensor
    places: Tensor
    tile: int
    asked: int


@dataclass(frozen=True)
class Chosen:
    """What stays of a view.

    Args:
        places: [K] ascending, of the rows in the image.
        rows: [K, D'].
    """

    places: Tensor
    rows: Tensor


def choose(
    plan: Plan,
    tokens: VisualTokens,
    asked: int,
    project: Project,
    in_places: bool = False,
) -> tuple[Selection, Tensor]:
    """Prune views of equal size.

    Args:
        plan: of the server.
        tokens: [V, n, ...], with all that the pruner needs but `projected`, which is added.
        asked: K; more than n keeps all.
        project: the model's projector.
        in_places: whether merged rows are in the order of their places.

    Returns:
        the selection, and the rows [V, K, D'].

    Raises:
        RuntimeError: if the pruner keeps another number than K: it would fill the places of another
            image.
    """
    pruner = plan.at(asked)
    if pruner.needs.projected and tokens.projected is None:
        tokens = replace(tokens, projected=project(tokens.features))
    selection = pruner.select(tokens)
    _check_number(pruner, selection, min(asked, tokens.num_tokens))
    if in_places:
        selection = selection.in_raster_order()
    if selection.merge is not None:
        return selection, project(merge(tokens, selection.merge))
    if tokens.projected is not None:
        return selection, take(tokens.projected, selection.keep_indices)
    return selection, project(take(tokens.features, selection.keep_indices))


def choose_views(
    plan: Plan,
    found: Mapping[str, Any],
    grid_hw: tuple[int, int],
    views: Sequence[View],
    project: Project,
) -> list[Chosen]:
    """Prune views of any sizes, merged rows in the order of their places.

    Args:
        plan: of the server.
        found: arguments of `VisualTokens` for the T tiles.
        grid_hw: of a tile.
        views: of all images.
        project: the model's projector.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for number, view in enumerate(views):
        groups.setdefault((len(view.index), view.asked), []).append(number)
    chosen: dict[int, Chosen] = {}
    device = found["features"].device
    for (_, asked), numbers in groups.items():
        these = [views[number] for number in numbers]
        index, places, tiles = (
            values.to(device, non_blocking=True)
            for values in (
                torch.stack([view.index for view in these]),
                torch.stack([view.places for view in these]),
                torch.tensor([view.tile for view in these]),
            )
        )
        seen = VisualTokens(grid_hw=grid_hw, **seen_of_tiles(dict(found), index, tiles))
        selection, rows = choose(plan, seen, asked, project, in_places=True)
        kept = places.gather(1, selection.keep_indices)
        chosen |= {n: Chosen(*pair) for n, *pair in zip(numbers, kept, rows, strict=True)}
    return [chosen[number] for number in range(len(views))]


@dataclass(frozen=True)
class TiledImage:
    """An image in tiles, with newlines between its lines.

    Args:
        token_map: where its tokens are among its rows, of this image alone.
        asked: K of each view.
        first: its first tile among those of the call.
    """

    token_map: TokenMap
    asked: Sequence[int]
    first: int


def tiled_rows(
    plan: Plan,
    found: Mapping[str, Any],
    images: Sequence[TiledImage],
    project: Project,
    newline: Tensor,
) -> list[Tensor]:
    """The rows [R', D'] of every image in tiles, newlines included.

    Args:
        plan: of the server.
        found: arguments of `VisualTokens` for the T tiles.
        images: whose tokens these are, none of them resized.
        project: the model's projector.
        newline: [D'].
    """
    tiling = plan.layout.tiling
    views = [view for image in images for view in _views(image, tiling.budget == "per_tile")]
    chosen = iter(choose_views(plan, found, plan.tower.grid_hw, views, project))
    rows = []
    for image in images:
        kept = list(islice(chosen, len(image.asked)))
        places, own = torch.cat([one.places for one in kept]), torch.cat([one.rows for one in kept])
        ends = image.token_map.ends(tiling.separators, image.token_map.source[:0])
        rows.append(with_ends(places, own, ends, newline)[1])
    return rows


def stacked_rows(
    plan: Plan,
    found: Mapping[str, Any],
    images: Sequence[tuple[int, Sequence[int]]],
    project: Project,
) -> list[Tensor]:
    """The rows [R', D'] of every image whose tiles are read one after the other, thumbnail last.

    Args:
        plan: of the server.
        found: arguments of `VisualTokens` for the T tiles of all images.
        images: of each, its tiles, and K of each view.
        project: the model's projector.
    """
    size = plan.tower.num_tokens
    views, first = [], 0
    for num_tiles, asked in images:
        whole = len(asked) == 1
        last = first + num_tiles - 1
        places = torch.arange(num_tiles * size).view(len(asked), -1)
        tiles = [last] if whole else range(first, last + 1)
        for own, tile, wanted in zip(places, tiles, asked, strict=True):
            views.append(View(own + first * size, own, tile, wanted))
        first += num_tiles
    chosen = iter(choose_views(plan, found, plan.tower.grid_hw, views, project))
    return [torch.cat([next(chosen).rows for _ in asked]) for _, asked in images]


def _views(image: TiledImage, per_tile: bool) -> Iterator[View]:
    token_map = image.token_map
    index, tiles, _ = token_map.views(per_tile)
    places, first = token_map.places().flatten(), image.first
    for own, tile, wanted in zip(index, tiles.tolist(), image.asked, strict=True):
        own = own[own >= 0]
        yield View(own + first * token_map.num_tokens, places[own], first + tile, wanted)


def _check_number(pruner: Pruner, selection: Selection, expected: int) -> None:
    kept = selection.keep_indices.shape[1]
    if kept != expected or selection.valid is not None:
        ragged = "" if selection.valid is None else ", some of which do not count"
        raise RuntimeError(
            f"pruner {pruner.name!r} kept {kept} tokens{ragged}, but {expected} places of every"
            " image are reserved."
        )
