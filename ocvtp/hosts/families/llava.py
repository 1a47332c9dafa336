"""LLaVA-1.5 in transformers: a CLIP, SigLIP or DINO tower, N = H W tokens an image.

Of a tower with registers the language model reads these too, before the tokens of each image. They
always stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.hosts.base import Encoded, Kept, Tiny
from ocvtp.hosts.families.clip_tower import ClipFamilyHost, Placed
from ocvtp.ops.token_views import counted, left_over, numbers_of_rows, seen_of_tiles
from ocvtp.random_models import tiny_llava
from ocvtp.structures import STAGES, Needs, Selection, Stage, VisualTokens
from ocvtp.transformers_names import DINO_TOWERS


class LlavaHost(ClipFamilyHost):
    """LLaVA-1.5 and models of its architecture.

    Keys of DINOv3 are those before rotation, since methods compare what they hold and not where
    they are; its attention is that of the turned ones.

    Raises:
        ValueError: for other towers than CLIP, SigLIP, DINOv2 and DINOv3, and for settings under
            which the tokens are no grid.
    """

    family: ClassVar[str] = "LLaVA"
    tiny: ClassVar[Tiny | None] = Tiny(tiny_llava.tiny_llava, tiny_llava.SPECIAL_TOKENS)
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    stages: ClassVar[tuple[Stage, ...]] = STAGES
    counts_operations: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {
        "image_sizes": "image_sizes belong to Pixtral towers; leave them out."
    }

    @property
    def grid_hw(self) -> tuple[int, int] | None:
        """DINO towers take images of any size."""
        return None if self.tower.config.model_type in DINO_TOWERS else self._usual_grid

    @property
    def image_tokens(self) -> int | None:
        return None if self.grid_hw is None else math.prod(self.grid_hw)

    @property
    def usual_tokens(self) -> int:
        return math.prod(self._usual_grid)

    def encode(self, images: dict[str, Any], needs: Needs) -> Encoded:
        output, found, later = self._look_inside(images, needs)
        rows = output.pooler_output
        features, first = found["features"], self.num_registers
        embeddings = self._rows(rows, later, features)
        found["features"] = features[:, first:]
        num_images, num_tokens = found["features"].shape[:2]
        grid = self._grid(images["pixel_values"], num_tokens)
        if needs.projected:
            found["projected"] = torch.stack(list(rows))[:, first:]
        places = torch.arange(len(embeddings), device=features.device)
        places, given = places.view(num_images, -1)[:, first:], None
        if (ran := found.pop("valid", None)) is not None:
            index, valid = left_over(ran)
            everyone = torch.arange(num_images, device=index.device)
            found = seen_of_tiles(found, counted(index, num_tokens), everyone)
            places = places.to(index.device).gather(1, index)
            places = places if valid is None else places.masked_fill(~valid, -1)
            found["valid"], given = valid, torch.full((num_images,), num_tokens)
        tokens = VisualTokens(grid_hw=grid, **found)
        return Placed(tokens, embeddings, num_given=given, places=places, output=output)

    def apply(self, encoded: Encoded, selection: Selection) -> Kept:
        assert isinstance(encoded, Placed)
        keep, registers = selection.keep_indices, None
        if self.num_registers:
            starts = encoded.first_rows(keep.device)[:, None]  # [I, 1]
            registers = (starts + torch.arange(self.num_registers, device=keep.device)).flatten()
        places = encoded.places.to(keep.device).gather(1, keep)
        return self._kept(encoded, selection, places, registers)

    def tokens_of_rows(self, encoded: Encoded) -> Tensor:
        assert isinstance(encoded, Placed)
        return numbers_of_rows(encoded.places, len(encoded.embeddings))

    def cells(self, encoded: Encoded) -> Tensor:
        assert isinstance(encoded, Placed)
        cells, (height, width) = encoded.places.cpu() - self.num_registers, encoded.tokens.grid_hw
        return cells.masked_fill((cells < 0) | (cells >= height * width), -1)
