"""InternVL (2.5 and 3) in transformers: an image is tiles of one size, and then a thumbnail.

T tiles of a call (thumbnails included), P patches of a tile, N tokens of it, each of which is a
unit of neighbouring patches put side by side; R rows that the language model reads of all images.
U views that pruners see (images, or tiles), M tokens of a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ocvtp.hosts.base import Encoded, Kept, Tiny
from ocvtp.hosts.families.clip_tower import ClipFamilyHost
from ocvtp.ops.token_views import seen_of_tiles
from ocvtp.random_models import tiny_internvl
from ocvtp.structures import Needs, Selection, VisualTokens
from ocvtp.towers import taps
from ocvtp.towers.hooks import Hook

_ALIKE = 1e-6  # squared errors of normalised pixels that are no difference


@dataclass(frozen=True, kw_only=True)
class Tiled(Encoded):
    """Images in tiles.

    Args:
        places: [U, M] the row of every token that pruners see, -1 on padding.
        pixels: [T, 3, H, W].
        num_tiles: of each image, its thumbnail included.
    """

    places: Tensor
    pixels: Tensor
    num_tiles: list[int]


class InternVLHost(ClipFamilyHost):
    """InternVL: pruners see the tokens of an image tile after tile, as they are read.

    A visual token is a unit of 2 x 2 patches: `features` are the unit's patches side by side,
    [U, M, 4 D], from which the projector makes a token, and `cls` is the CLS of the selected layer
    in the place of each of the four. `hidden`, `keys` (normed, where the tower norms them) and
    attention are means over the patches; attention is what each tile's own gives. `cls` (and the
    CLS of `keys`) is that of the thumbnail, or of the only tile; `grid_hw` is the grid of one tile.
    Images are told apart by the prompt: each is one run of placeholders. Merged rows stand in the
    places of their anchors. Frames of a video are images of one tile.

    Raises:
        ValueError: for other towers than InternVL's own.
    """

    family: ClassVar[str] = "InternVL"
    tiny: ClassVar[Tiny | None] = Tiny(tiny_internvl.tiny_internvl, tiny_internvl.SPECIAL_TOKENS)
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    towers: ClassVar[dict[str, int]] = {"internvl_vision": 1}
    counts_operations: ClassVar[bool] = True
    image_keys: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )

    def tower_parts(self) -> taps.Tower:
        def query_key(block: Any) -> tuple[nn.Module, nn.Module]:
            return block.attention.q_norm, block.attention.k_norm

        return taps.Tower(
            self.tower.encoder.layer, self.tower.config.num_attention_heads, query_key
        )

    def _check_clip(self, needs: Needs) -> None:
        if needs.clip:
            raise ValueError(
                "the pruner compares images with the prompt in CLIP's space, where the tokens of"
                " InternVL are not; use a pruner that reads the language model's `text`, or none of"
                " the prompt (see `ocvtp list`)."
            )

    def _after_blocks(self) -> list[nn.Module]:
        return [self.tower.layernorm]

    def hooks(self, needs: Needs) -> list[Hook]:
        return [*super().hooks(needs), taps.keep_normed_of(self.tower.layernorm)]

    def encode(self, images: dict[str, Any], needs: Needs) -> Encoded:
        """Tiles as images of their own."""
        output, found, later = self._look_inside(images, needs)
        rows = output.pooler_output
        features = found["features"]
        num_tiles, num_tokens = features.shape[:2]
        for name in ("hidden", "attention", "keys"):
            found[name] = {key: self._by_unit(values) for key, values in found[name].items()}
        if needs.cls:
            found["cls"] = found["cls"].repeat(1, self.unit_side**2)
        tokens = VisualTokens(
            grid_hw=self._grid(images["pixel_values"], num_tokens),
            projected=rows if needs.projected else None,
            **found,
        )
        places = torch.arange(num_tiles * num_tokens, device=tokens.features.device)
        return Tiled(
            tokens,
            self._rows(rows, later, features),
            places=places.view(num_tiles, num_tokens),
            pixels=images["pixel_values"],
            num_tiles=[1] * num_tiles,
            output=output,
        )

    def by_image(self, encoded: Encoded, slots: Tensor) -> Encoded:
        """See `Host.by_image`.

        Raises:
            ValueError: if the prompt does not have whole tiles in a row.
        """
        assert isinstance(encoded, Tiled)
        num_tokens, device = encoded.tokens.num_tokens, encoded.places.device
        runs = _runs(slots.cpu())
        if bool((runs % num_tokens).any()):
            raise ValueError(
                f"the prompt has {runs.tolist()} image placeholders in a row, but each tile of an"
                f" image gives {num_tokens} tokens; make both with one call of the processor."
            )
        counts = runs // num_tokens
        ends, num_tiles = counts.cumsum(dim=0), counts.tolist()
        starts = (ends - counts) * num_tokens
        if self.tiling.budget == "per_tile":
            return replace(encoded, starts=starts.repeat_interleave(counts), num_tiles=num_tiles)
        images = encoded.places.cpu().flatten().split(runs.tolist())
        places = nn.utils.rnn.pad_sequence(list(images), batch_first=True, padding_value=-1)
        valid = places >= 0
        index = torch.where(valid, places, starts[:, None]).to(device)
        seen = seen_of_tiles(vars(encoded.tokens), index, (ends - 1).to(device))
        seen["valid"] = None if bool(valid.all()) else valid.to(device)
        tokens, places = VisualTokens(**seen), places.to(device)
        return replace(encoded, tokens=tokens, starts=starts, places=places, num_tiles=num_tiles)

    def apply(self, encoded: Encoded, selection: Selection) -> Kept:
        assert isinstance(encoded, Tiled)
        keep = selection.keep_indices.clamp(0, encoded.places.shape[1] - 1)
        return self._kept(encoded, selection.in_raster_order(), encoded.places.gather(1, keep))

    def grids(self, encoded: Encoded) -> tuple[tuple[int, int], ...]:
        """The thumbnail, and the tiles put together."""
        assert isinstance(encoded, Tiled)
        height, width = grid = encoded.tokens.grid_hw
        if encoded.num_tiles[0] == 1:
            return (grid,)
        rows, columns = _arrangement(encoded.pixels[: encoded.num_tiles[0]])
        return grid, (rows * height, columns * width)

    def cells(self, encoded: Encoded) -> Tensor:
        assert isinstance(encoded, Tiled)
        (height, width), *tiled = self.grids(encoded)
        order = torch.full((len(encoded.embeddings),), -1)
        num_read = encoded.num_tiles[0] * height * width
        order[num_read - height * width : num_read] = torch.arange(height * width)
        for rows, columns in tiled:
            fine = height * width + torch.arange(rows * columns).view(-1, height, columns)
            by_tile = fine.unflatten(2, (-1, width)).transpose(1, 2)  # [rows, columns, H, W]
            order[: rows * columns] = by_tile.flatten()
        places = encoded.places.cpu()
        return order[places].masked_fill(places < 0, -1)

    def picture(self, images: dict[str, Any]) -> Tensor:
        """The thumbnail, where the call has a single image."""
        pixels: Tensor = images["pixel_values"][-1]
        return pixels

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"budget": self.tiling.budget}

    @property
    def grid_hw(self) -> tuple[int, int]:
        config, side = self.tower.config, self.unit_side
        rows, columns = (n // p for n, p in zip(config.image_size, config.patch_size, strict=True))
        return rows // side, columns // side

    @property
    def usual_tokens(self) -> int:
        """Of an image of two tiles by two, and its thumbnail."""
        return 5 * math.prod(self.grid_hw)

    @property
    def unit_side(self) -> int:
        return round(1 / self.model.config.downsample_ratio)

    def _selected(self, record: taps.Recording) -> Tensor:
        if self.model.config.vision_feature_layer == -1:  # not of `hidden_states`: after the norm
            assert record.normed is not None
            return record.normed
        return super()._selected(record)

    def _grid(self, pixel_values: Tensor, num_tokens: int) -> tuple[int, int]:
        height, width = self._num_patches(pixel_values)
        grid = height // self.unit_side, width // self.unit_side
        assert grid[0] * grid[1] == num_tokens, (grid, num_tokens)
        return grid

    def _num_patches(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of a tile's patches."""
        height, width = self.tower.config.patch_size
        return pixel_values.shape[-2] // height, pixel_values.shape[-1] // width

    def _check_settings(self, images: dict[str, Any], needs: Needs) -> None:
        super()._check_settings(images, needs)
        rows, columns = self._num_patches(images["pixel_values"])
        if rows != columns or rows % self.unit_side:
            raise ValueError(
                f"a tile of {rows} x {columns} patches is no square of units of {self.unit_side} x"
                f" {self.unit_side}, as InternVL needs; pass tiles as the processor makes them."
            )

    def _by_unit(self, patches: Tensor) -> Tensor:
        return means_by_unit(patches, self.unit_side, self.model.model.pixel_shuffle)


def means_by_unit(
    patches: Tensor, unit_side: int, shuffle: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """[T, P, ...] -> [T, N, ...], means over the units of the model's own pixel shuffle.

    Args:
        patches: of square tiles.
        unit_side: patches along the side of a unit.
        shuffle: [T, H, W, C] and the scale -> [T, H', W', C'], the patches of a unit side by side.
    """
    side = round(patches.shape[1] ** 0.5)
    square = patches.reshape(len(patches), side, side, -1)
    units = shuffle(square, 1 / unit_side)
    means = units.unflatten(3, (unit_side**2, -1)).mean(dim=3)
    return means.reshape(len(patches), -1, *patches.shape[2:])


def _runs(slots: Tensor) -> Tensor:
    """[I] lengths of the runs of neighbouring placeholders, of rows and columns [R, 2]."""
    row, column = slots.diff(dim=0).unbind(dim=1)
    last = torch.ones(len(slots), dtype=torch.bool)
    last[:-1] = (row != 0) | (column != 1)
    ends = last.nonzero()[:, 0] + 1
    return ends.diff(prepend=ends.new_zeros(1))


def _arrangement(pixels: Tensor) -> tuple[int, int]:
    """Rows and columns in which the tiles of an image look most like the thumbnail after them.

    Where several look the same, as of a blank image, it is the one nearest to a square of these: no
    more can be told.

    Args:
        pixels: [T, 3, H, W]; nothing else tells how the image was cut.
    """
    *tiles, thumbnail = pixels.float().cpu()
    found = {}
    for rows in (n for n in range(1, len(tiles) + 1) if len(tiles) % n == 0):
        lines = torch.stack(tiles).unflatten(0, (rows, -1))  # [rows, columns, 3, H, W]
        whole = lines.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        small = nn.functional.adaptive_avg_pool2d(whole, thumbnail.shape[-2:])
        found[rows, len(tiles) // rows] = float((small - thumbnail).square().mean())
    likely = [one for one, error in found.items() if error <= min(found.values()) + _ALIKE]
    return min(likely, key=lambda one: max(one) / min(one))
