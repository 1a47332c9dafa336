"""How a model in a server turns an image into rows, before anything is pruned.

A server reserves the places of an image before its tower runs, so all of this follows from the
model's configuration and the size of the image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.hosts.base import Tiling
from ocvtp.hosts.families.tiles import TokenMap
from ocvtp.pruners import Pruner
from ocvtp.towers.taps import resolve
from ocvtp.towers.windows import Units, window_order, window_sizes
from ocvtp.transformers_names import both, count_tiles, pack_tiles, patch_grid

_WHOLE = "fullatt_block_indexes"
"""Of a tower with windows, its blocks that attend to whole images."""
_CLIP_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""The `model_type` of towers that servers build, and the tokens before the patches."""


@dataclass(frozen=True)
class ServedTower:
    """What the vision tower of a server has.

    Args:
        num_blocks: of the whole tower.
        num_built: blocks that the server builds and runs: those before the selected layer.
        num_prefix: tokens before the patches: 1 with a CLS, else 0.
        grid_hw: rows and columns of the tokens of an image, or of a tile of one.
    """

    num_blocks: int
    num_built: int
    num_prefix: int
    grid_hw: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """N, visual tokens of an image, or of a tile of one."""
        return self.grid_hw[0] * self.grid_hw[1]

    def layer(self, number: int) -> int:
        """The non-negative number of a layer of `hidden_states` of the whole tower."""
        return resolve(number, self.num_blocks + 1, "hidden_states")

    def block(self, number: int) -> int:
        """The non-negative number of a block of the whole tower."""
        return resolve(number, self.num_blocks, "blocks")


@dataclass(frozen=True)
class Shape:
    """The rows of one image, before anything is pruned.

    Args:
        views: tokens of each view that a pruner chooses from: of the image, or of every tile.
        ends: rows that end lines, that are no tokens and stay.
        is_grid: whether the tokens of a view are the whole grid.
        is_resized: whether they are means of the tower's tokens.
    """

    views: tuple[int, ...]
    ends: int = 0
    is_grid: bool = True
    is_resized: bool = False

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the image."""
        return sum(self.views)

    def num_rows(self, asked: Sequence[int]) -> int:
        """Rows that the language model reads, where so many tokens of each view are asked for."""
        kept = (min(*pair) for pair in zip(asked, self.views, strict=True))
        return sum(kept) + self.ends


class Layout(ABC):
    """Of a family of models.

    Args:
        config: of the model, as transformers has it.
        tiling: how images in tiles are pruned.

    Raises:
        ValueError: for models whose images cannot be pruned in a server.
    """

    fixed: ClassVar[bool] = False
    """Whether all images have equally many tokens."""
    keeps_coordinates: ClassVar[bool] = False
    """Whether the rows that stay keep the positions of their places in the image."""

    def __init__(self, config: Any, tiling: Tiling) -> None:
        self.config = config
        self.tiling = tiling
        self.tower = self._tower()

    @abstractmethod
    def _tower(self) -> ServedTower:
        """What the vision tower has, as servers build it."""

    @property
    def widths(self) -> dict[str, Any]:
        """Of what pruners read, as arguments of `ocvtp.pruners.checks.random_tokens`."""
        vision, text = self.config.vision_config, self.config.get_text_config()
        width = int(vision.hidden_size)
        widths = {"features": width, "tower": width, "projected": int(text.hidden_size)}
        return widths | {"num_heads": int(vision.num_attention_heads)}

    def check(self, shape: Shape, pruner: Pruner) -> None:
        """Refuse an image whose tokens a pruner cannot choose from.

        Raises:
            ValueError: that says what the caller can do.
        """
        if not shape.is_resized:
            return
        names = ("hidden", "attention", "keys", "cls_queries", "cls")
        needs = [f"reads {name}" for name in names if getattr(pruner.needs, name)]
        needs += ["merges tokens before the projector"] if pruner.merging else []
        needs += ["has a budget per_tile"] if self.tiling.budget == "per_tile" else []
        if needs:
            raise ValueError(
                f"pruner {pruner.name!r} {', '.join(needs)}, but the model resizes the tokens of an"
                " image this large across its tiles (vision_aspect_ratio), so that it reads means"
                " of those of the tower; pass a smaller image, or serve a pruner that reads nothing"
                " but projected tokens, with a budget per_image."
            )


class LlavaLayout(Layout):
    """LLaVA-1.5: one grid of tokens, whatever the size of the image.

    Raises:
        ValueError: for other towers than CLIP and SigLIP, and where tokens are no grid of one
            layer.
    """

    fixed: ClassVar[bool] = True

    def _tower(self) -> ServedTower:
        vision, layer = self.config.vision_config, self.config.vision_feature_layer
        if vision.model_type not in _CLIP_TOWERS:
            raise ValueError(
                f"this model has a {vision.model_type} tower; in a server, visual tokens can be"
                f" pruned after {' and '.join(_CLIP_TOWERS)}."
            )
        num_prefix = _CLIP_TOWERS[vision.model_type]
        wanted = "default" if num_prefix else "full"
        if (strategy := self.config.vision_feature_select_strategy) != wanted:
            raise ValueError(
                f"vision_feature_select_strategy={strategy!r} does not hand the language model the"
                f" token grid of a {vision.model_type}; pass {wanted!r}."
            )
        num_blocks = vision.num_hidden_layers
        built = resolve(one_layer(layer), num_blocks + 1, "hidden_states")
        return ServedTower(num_blocks, built, num_prefix, patch_grid(vision))

    def shape(self) -> Shape:
        """Of every image."""
        return Shape((self.tower.num_tokens,))


class TiledLayout(LlavaLayout):
    """LLaVA-NeXT: a base view and tiles, each line of which ends with a newline."""

    fixed: ClassVar[bool] = False

    def shape(self, size: tuple[int, int] = (0, 0)) -> Shape:
        """Of an image of this height and width in pixels."""
        token_map = self.token_map(size)
        views = tuple(map(len, self.views(token_map)))
        ends = token_map.ends(self.tiling.separators, token_map.source[:0])
        grid = self.tower.num_tokens
        is_grid = all(count == grid for count in views)
        return Shape(views, len(ends), is_grid, token_map.mixed)

    def views(self, token_map: TokenMap) -> list[Tensor]:
        """Of each view the numbers [n] of its tokens, counted over the tiles of the image."""
        index, _, _ = token_map.views(self.tiling.budget == "per_tile")
        return [view[view >= 0] for view in index]

    def largest(self, pruner: Pruner) -> tuple[int, int]:
        """Height and width of an image with most tokens, of those that a pruner can choose from.

        Raises:
            ValueError: if there is none.
        """
        fitting, refused = [], None
        for size in self._large_sizes():
            shape = self.shape(size)
            try:
                self.check(shape, pruner)
            except ValueError as error:
                refused = error
            else:
                fitting.append((shape.num_tokens + shape.ends, size))
        if not fitting:
            assert refused is not None
            raise refused
        return max(fitting)[1]

    def _large_sizes(self) -> list[tuple[int, int]]:
        return [(height, width) for height, width in self.config.image_grid_pinpoints]

    @cached_property
    def token_map(self) -> Callable[[tuple[int, int]], TokenMap]:
        """Where the tokens of an image's tiles are among its rows; argument as of `shape`."""
        return lru_cache(maxsize=1024)(self._token_map)

    def _token_map(self, size: tuple[int, int]) -> TokenMap:
        side, _ = both(self.config.vision_config.image_size)
        count = count_tiles(list(size), self.config.image_grid_pinpoints, side)
        pack = partial(pack_tiles, self.config, [list(size)])
        return TokenMap.of(pack, [count], self.tower.num_tokens)


class OnevisionLayout(TiledLayout):
    """LLaVA-OneVision: as LLaVA-NeXT, but tokens of large images are resized to fewer."""

    def _large_sizes(self) -> list[tuple[int, int]]:
        """With that of which vLLM says that it has most tokens, at the published settings."""
        return [*super()._large_sizes(), (944, 1153)]


class InternVLLayout(Layout):
    """InternVL: tiles of one size and then a thumbnail; a token is a unit of patches."""

    def _tower(self) -> ServedTower:
        vision = self.config.vision_config
        if vision.model_type != "internvl_vision":
            raise ValueError(
                f"this InternVL has a {vision.model_type} tower; in a server, visual tokens can be"
                " pruned after internvl_vision: use a checkpoint that transformers reads"
                " (OpenGVLab/...-hf)."
            )
        rows, columns = patch_grid(vision)
        side = self.unit_side
        num_blocks = int(vision.num_hidden_layers)
        if (layer := self.config.vision_feature_layer) != -1:
            raise ValueError(
                f"vision_feature_layer={layer}, but vLLM reads the last layer of an InternVL,"
                " whatever this says; serve a model with -1."
            )
        return ServedTower(num_blocks, num_blocks, 1, (rows // side, columns // side))

    @property
    def unit_side(self) -> int:
        """Patches along the side of a token."""
        return round(1 / float(self.config.downsample_ratio))

    @property
    def widths(self) -> dict[str, Any]:
        widths = super().widths
        return widths | {"features": widths["features"] * self.unit_side**2}

    def shape(self, num_tiles: int = 1) -> Shape:
        """Of an image in so many tiles, the thumbnail included."""
        tokens = self.tower.num_tokens
        if self.tiling.budget == "per_tile":
            return Shape((tokens,) * num_tiles)
        return Shape((num_tiles * tokens,), is_grid=num_tiles == 1)


def one_layer(layer: Any) -> int:
    """The layer that the language model reads.

    Raises:
        ValueError: where it reads several.
    """
    if not isinstance(layer, int):
        raise ValueError(
            f"vision_feature_layer={layer}: this model selects several layers, and pruning in a"
            " server reads those of one; serve it without the pruner."
        )
    return int(layer)


class QwenLayout(Layout):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images of any shape; a token is a unit of 2 x 2 patches."""

    keeps_coordinates: ClassVar[bool] = True

    def _tower(self) -> ServedTower:
        depth = int(self.config.vision_config.depth)
        return ServedTower(depth, depth, 0, (0, 0))

    @property
    def unit_side(self) -> int:
        """Patches along the side of a token."""
        return int(self.config.vision_config.spatial_merge_size)

    @property
    def widths(self) -> dict[str, int]:
        vision, read = self.config.vision_config, int(self.config.get_text_config().hidden_size)
        tower = int(getattr(vision, "embed_dim", vision.hidden_size))
        heads = int(vision.num_heads)
        return {"features": read, "tower": tower, "projected": read, "num_heads": heads}

    def grid(self, grid_thw: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of an image's tokens, from those of its patches."""
        _, rows, columns = grid_thw
        return int(rows) // self.unit_side, int(columns) // self.unit_side

    def shape(self, grid_thw: Sequence[int]) -> Shape:
        """Of an image of so many frames (1), rows and columns of patches."""
        rows, columns = self.grid(grid_thw)
        return Shape((rows * columns,))

    def units(self, grids: Sequence[tuple[int, int]]) -> Units:
        """The tokens of images, among the patches as the tower runs them."""
        counts = [rows * columns for rows, columns in grids]
        places = torch.arange(sum(counts))
        if (window := self._window) is not None:
            places = window_order(grids, window).argsort()
        return Units(self.unit_side**2, counts, places)

    def ends(self, block: int, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Where the segments begin and end that attend inside themselves, among all patches."""
        window, whole = self._window, getattr(self.config.vision_config, _WHOLE, ())
        sizes = [rows * columns for rows, columns in grids]
        if window is not None and block not in whole:
            sizes = [size for grid in grids for size in window_sizes(grid, window)]
        return torch.tensor([0, *sizes]).cumsum(dim=0) * self.unit_side**2

    @property
    def _window(self) -> int | None:
        """Units along the side of a window; None for towers without."""
        vision = self.config.vision_config
        pixels = getattr(vision, "window_size", None)
        return None if pixels is None else int(pixels) // int(vision.patch_size) // self.unit_side
