"""The tower of a LLaVA-NeXT, frozen and cut: images as a base view and tiles of higher resolution.

T tiles of all images (base views included), N tokens of a tile; U views that share slots (images,
or tiles), M tokens of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaNextImageProcessor

from ocvtp.encoders.base import DType
from ocvtp.encoders.clip import CLIPEncoder, ProcessorTransform
from ocvtp.structures import VisualTokens
from ocvtp.transformers_names import image_size, tile_grid, unpad

Slots = Literal["joint", "per_tile"]


class TiledEncoder(CLIPEncoder):
    """A frozen tower, as `CLIPEncoder` takes, over the tiles of LLaVA-NeXT's image processor.

    Tokens are those that the host shows to pruners: of an image first those of the base view, then
    those of the tiles, row by row of the whole image, without what unpadding removes.

    Args:
        tower: hub id or folder of a LLaVA-NeXT, or what `CLIPEncoder` takes.
        layer: number of `hidden_states` that the OC-pruner reads; paper: 9 of CLIP ViT-L/14-336.
        slots: `joint`: the tokens of all tiles of an image share the slots; `per_tile`: each tile
            is an image of its own.
        dtype: of weights and computation.
        processor: hub id or folder of the image processor, which must cut images into tiles; None
            for the tower's own.
        seed: of random weights.

    Raises:
        ValueError: for other `slots`, or a processor that makes no tiles.
    """

    def __init__(
        self,
        tower: str | dict[str, Any] = "llava-hf/llava-v1.6-vicuna-7b-hf",
        layer: int = 9,
        slots: Slots = "joint",
        dtype: DType = "float32",
        processor: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(tower, layer, dtype, processor, seed)
        if slots not in ("joint", "per_tile"):
            raise ValueError(f"slots={slots!r}; pass 'joint' or 'per_tile'.")
        self.layout = slots
        self._side, _ = image_size(self._config)
        tiler = self._image_processor(processor)
        if not getattr(tiler, "image_grid_pinpoints", None):
            raise ValueError(
                f"a {type(tiler).__name__} does not cut images into tiles; pass `processor`, the id"
                " or folder of a LLaVA-NeXT, or use ocvtp.encoders.clip.CLIPEncoder."
            )
        self._pinpoints: list[list[int]] = [list(p) for p in tiler.image_grid_pinpoints]
        self.transform = TilesTransform(tiler)

    @property
    def max_tokens(self) -> int:
        if self.layout == "per_tile":
            return super().max_tokens
        most = max(height * width for height, width in self._pinpoints) // self._side**2
        return (1 + most) * super().max_tokens

    def _image_processor(self, processor: str | None) -> Any:
        if processor is not None or not self._is_random:
            return super()._image_processor(processor)
        side, _ = image_size(self._config)
        shapes = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA-NeXT's own
        return LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=[[side * rows, side * columns] for rows, columns in shapes],
        )

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> VisualTokens:
        """Encode.

        Args:
            pixel_values: of each of B images [tiles, 3, side, side], as `transform` makes them.
            image_sizes: height and width of each before that.

        Returns:
            The visual tokens with what `load` was asked for, in fp32. `joint`: [B, M] of images,
            with `grids` [B, 2, 2] of base view and tiles; `per_tile`: [U, N] of tiles, all base
            views before the others, tiles of padding alone left out. Values are 0 where `valid` is
            False; a CLS is that of the base view, or of the tile.

        Raises:
            ValueError: without `image_sizes`.
        """
        if image_sizes is None or len(image_sizes) != len(pixel_values):
            raise ValueError(
                f"{len(pixel_values)} images in tiles, image_sizes={image_sizes}; pass the height"
                " and width that each had before it was cut."
            )
        seen = super().forward(torch.cat(list(pixel_values)))
        counts = [len(tiles) for tiles in pixel_values]
        if self.layout == "per_tile":
            index, tiles = self._apart(counts, image_sizes)
            return _view(seen, index, tiles, None)
        return _view(seen, *self._jointly(counts, image_sizes))

    def _kept(self, size: tuple[int, int], num_tiles: int) -> Tensor:
        """[rows, columns] numbers of the tokens that unpadding leaves of all tiles of an image.

        They are counted from the first token of the first tile after the base view.
        """
        height, width = self.grid_hw
        rows, columns = tile_grid(size, self._pinpoints, self._side)
        assert rows * columns == num_tiles - 1, (size, rows, columns, num_tiles)
        numbers = torch.arange(rows * columns * height * width)
        image = numbers.view(rows, columns, height, width).transpose(1, 2)
        kept: Tensor = unpad(image.reshape(1, rows * height, columns * width), size)[0]
        return kept

    def _jointly(
        self, counts: Sequence[int], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, M] tokens among the T N of all tiles, -1 on padding; [B] base views; [B, 2, 2]."""
        num_tokens, first = super().max_tokens, 0
        index, tiles, grids = [], [], []
        for count, size in zip(counts, sizes, strict=True):
            kept, base = self._kept(size, count), first * num_tokens + torch.arange(num_tokens)
            index.append(torch.cat([base, (first + 1) * num_tokens + kept.flatten()]))
            tiles.append(first)
            grids.append([list(self.grid_hw), list(kept.shape)])
            first += count
        padded = pad_sequence(index, batch_first=True, padding_value=-1)
        return padded, torch.tensor(tiles), torch.tensor(grids)

    def _apart(
        self, counts: Sequence[int], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """[U, N] tokens among the T N of all tiles, -1 on padding; [U] the tiles."""
        num_tokens, first = super().max_tokens, 0
        index = torch.full((sum(counts) * num_tokens,), -1)
        bases = []
        for count, size in zip(counts, sizes, strict=True):
            base = first * num_tokens + torch.arange(num_tokens)
            for own in (base, (first + 1) * num_tokens + self._kept(size, count).flatten()):
                index[own] = own
            bases.append(first)
            first += count
        index = index.view(-1, num_tokens)
        others = (index >= 0).any(dim=1)
        others[bases] = False
        tiles = torch.cat([torch.tensor(bases), others.nonzero()[:, 0]])
        return index[tiles], tiles


def _view(seen: VisualTokens, index: Tensor, tiles: Tensor, grids: Tensor | None) -> VisualTokens:
    """The tokens of tiles as views.

    Args:
        seen: [T, N].
        index: [U, M] tokens among the T N, -1 on padding.
        tiles: [U] the tile whose CLS stands for each view.
        grids: [U, V, 2].
    """
    device, is_full = seen.features.device, grids is None and bool((index >= 0).all())
    padding = (index < 0).to(device)
    index, tiles = index.clamp(min=0).to(device), tiles.to(device)

    def of_tokens(values: Tensor) -> Tensor:  # [T, N, ...] -> [U, M, ...]
        found = values.flatten(0, 1)[index]
        return found.masked_fill(padding.view(*padding.shape, *[1] * (found.ndim - 2)), 0.0)

    hidden = {number: of_tokens(values) for number, values in seen.hidden.items()}
    return replace(
        seen,
        features=next(iter(hidden.values())),
        valid=None if is_full else ~padding,
        grids=None if grids is None else grids.to(device),
        cls=None if seen.cls is None else seen.cls[tiles],
        hidden=hidden,
        attention={key: of_tokens(values) for key, values in seen.attention.items()},
        keys={number: of_tokens(values) for number, values in seen.keys.items()},
        cls_keys={number: values[tiles] for number, values in seen.cls_keys.items()},
        cls_queries={number: values[tiles] for number, values in seen.cls_queries.items()},
    )


class TilesTransform(ProcessorTransform):
    """The image transform of a processor that cuts images into tiles: [tiles, 3, side, side]."""

    def instance_map(self, ids: np.ndarray) -> Tensor:
        """Instance ids [h, w] uint8 of the base view: [side, side] int64."""
        return super().instance_map(ids)[0]
