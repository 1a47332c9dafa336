"""LLaVA-NeXT (LLaVA-1.6) in transformers: an image is a base view and tiles of higher resolution.

T tiles of a call (base views included), N tokens of a tile, R rows that the language model reads of
all images: tokens, and a newline after every row of an image's tiles. U views that pruners see
(images, or tiles), M tokens of a view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.hosts.base import Encoded, Kept, Savings, Tiling, Tiny
from ocvtp.hosts.families.clip_tower import ClipFamilyHost, Placed
from ocvtp.hosts.families.tiles import TokenMap, newline_of, with_ends
from ocvtp.hosts.lazy_projection import Rows
from ocvtp.ops.token_views import numbers_of_rows, seen_of_tiles
from ocvtp.pruners import Pruner
from ocvtp.random_models import tiny_llava
from ocvtp.structures import STAGES, Needs, Selection, Stage, VisualTokens
from ocvtp.transformers_names import count_tiles


@dataclass(frozen=True, kw_only=True)
class Packed(Placed):
    """Images in tiles.

    Args:
        token_map: of the call.
        newline: [D'] the row that ends lines; None where there is none.
    """

    token_map: TokenMap
    newline: Tensor | None


class LlavaNextHost(ClipFamilyHost):
    """LLaVA-NeXT: pruners see the tokens of an image in the order in which they are read.

    Tokens that unpadding removes and newlines are not among them; `cls` (and the CLS of `keys`) is
    that of the base view, `grid_hw` the grid of one tile. Attention is what each tile's own gives.
    Merged rows stand in the places of their anchors, so that each is in its line.

    Raises:
        ValueError: for other towers than CLIP, SigLIP and DINO without registers.
    """

    family: ClassVar[str] = "LLaVA-NeXT"
    tiny: ClassVar[Tiny | None] = Tiny(tiny_llava.tiny_llava_next, tiny_llava.SPECIAL_TOKENS)
    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    stages: ClassVar[tuple[Stage, ...]] = STAGES
    counts_operations: ClassVar[bool] = True

    def __init__(
        self, model: Any, tiling: Tiling | None = None, savings: Savings | None = None
    ) -> None:
        super().__init__(model, tiling, savings)
        self._refuse_registers()

    @property
    def usual_tokens(self) -> int:
        """Of an image of two tiles by two, and its base view."""
        return 5 * math.prod(self._usual_grid)

    def set_stages(self, parts: Sequence[Pruner], needs: Needs, processor: Any = None) -> None:
        """Each tile is one image to them."""
        for part in parts:
            if part.num_keep is not None and self.tiling.budget == "per_image":
                raise ValueError(
                    f"pruner {part.name!r} acts in the vision tower, on one tile at a time, so that"
                    f" num_keep={part.num_keep} cannot be that of an image; pass"
                    " budget='per_tile', or keep_ratio in place of num_keep."
                )
        super().set_stages(parts, needs, processor)

    def encode(self, images: dict[str, Any], needs: Needs) -> Encoded:
        output, found, later = self._look_inside(images, needs)
        rows = output.pooler_output
        num_tokens = found["features"].shape[1]
        token_map = self._token_map(images, num_tokens)
        grid = self._grid(images["pixel_values"], num_tokens)
        embeddings = self._rows(rows, later, found["features"], token_map.source)
        newline = newline_of(rows, token_map)
        packed = self._packed(embeddings, newline, found, token_map, grid, needs)
        return replace(packed, output=output)

    def _packed(
        self,
        embeddings: Rows,
        newline: Tensor | None,
        found: dict[str, Any],
        token_map: TokenMap,
        grid: tuple[int, int],
        needs: Needs,
    ) -> Packed:
        """What pruners see.

        Args:
            embeddings: what the language model would read.
            newline: among that, see `Packed`.
            found: arguments of `VisualTokens` for the T tiles.
            token_map: from tiles to rows.
            grid: of one tile.
            needs: of the pruner.
        """
        device = found["features"].device
        per_tile = self.tiling.budget == "per_tile"
        ran, given = found.pop("valid", None), None
        if ran is not None:
            given = (token_map.views(per_tile)[0] >= 0).sum(dim=1)
        views = token_map.seen(per_tile, None if ran is None else ran.cpu())
        index, places = views.index.to(device), views.places.to(device)
        read = places.clamp(min=0).to(embeddings.device)
        tokens = VisualTokens(
            grid_hw=grid,
            valid=None if views.valid is None else views.valid.to(device),
            projected=embeddings[read].to(device) if needs.projected else None,
            **seen_of_tiles(found, index, views.tiles.to(device)),
        )
        return Packed(
            tokens,
            embeddings,
            views.starts,
            num_given=given,
            places=places,
            token_map=token_map,
            newline=newline,
        )

    def apply(self, encoded: Encoded, selection: Selection) -> Kept:
        assert isinstance(encoded, Packed)
        keep = selection.keep_indices.clamp(0, encoded.places.shape[1] - 1)
        kept = self._kept(encoded, selection.in_raster_order(), encoded.places.gather(1, keep))
        ends = encoded.token_map.ends(self.tiling.separators, kept.positions)
        return Kept(*with_ends(kept.positions, kept.embeddings, ends, encoded.newline))

    def tokens_of_rows(self, encoded: Encoded) -> Tensor:
        """Where every tile is shown alone, tokens are counted in their tile."""
        assert isinstance(encoded, Packed)
        return numbers_of_rows(encoded.places, len(encoded.embeddings))

    def lines(self, encoded: Encoded) -> Tensor | None:
        assert isinstance(encoded, Packed)
        token_map = encoded.token_map
        if self.tiling.separators != "rows" or bool((token_map.source >= 0).all()):
            return None
        return token_map.line

    def grids(self, encoded: Encoded) -> tuple[tuple[int, int], ...]:
        """The base view, and the tiles put together and unpadded."""
        assert isinstance(encoded, Packed)
        base = encoded.tokens.grid_hw
        first = slice(encoded.token_map.lengths[0])
        line, is_token = encoded.token_map.line[first], encoded.token_map.source[first] >= 0
        if int(line.min()) >= 0 or int(line.max()) < 0:  # no tiles, or all of them padding
            return (base,)
        num_lines, num_fine = int(line.max()) + 1, int((is_token & (line >= 0)).sum())
        return base, (num_lines, num_fine // num_lines)

    def cells(self, encoded: Encoded) -> Tensor:
        """Tokens are drawn in the order in which they are read."""
        assert isinstance(encoded, Packed)
        token_map = encoded.token_map
        is_token = token_map.source[: token_map.lengths[0]] >= 0
        order = torch.full((len(token_map.source),), -1)
        order[: len(is_token)] = (is_token.cumsum(dim=0) - 1).masked_fill(~is_token, -1)
        places = encoded.places.cpu()
        return order[places].masked_fill(places < 0, -1)

    def describe(self) -> dict[str, Any]:
        tiling = {"budget": self.tiling.budget, "separators": self.tiling.separators}
        return super().describe() | tiling

    def _check_settings(self, images: dict[str, Any], needs: Needs) -> None:
        super()._check_settings(images, needs)
        if images.get("image_sizes") is None:
            raise ValueError(
                "image_sizes are missing, which say how images were cut into tiles; pass all that"
                " the processor returned."
            )

    def _token_map(self, images: dict[str, Any], num_tokens: int) -> TokenMap:
        return TokenMap.of(partial(self._pack, images), self._num_tiles(images), num_tokens)

    def _num_tiles(self, images: dict[str, Any]) -> list[int]:
        """Tiles of each image, the base view included."""
        pinpoints = self.model.config.image_grid_pinpoints
        side = self.model.config.vision_config.image_size
        return [count_tiles(size, pinpoints, side) for size in sizes_of(images)]

    def _pack(
        self, images: dict[str, Any], tiles: Sequence[Tensor], newline: Tensor
    ) -> list[Tensor]:
        """The model's own packing of each image's tiles [tiles, N, C] with newlines [C]."""
        packed, _ = self.model.model.pack_image_features(
            tiles,
            sizes_of(images),
            vision_feature_select_strategy=self._strategy(images),
            image_newline=newline,
        )
        return list(packed)


def sizes_of(images: dict[str, Any]) -> list[list[int]]:
    """Heights and widths of the images."""
    sizes: list[list[int]] = torch.as_tensor(images["image_sizes"]).tolist()
    return sizes
