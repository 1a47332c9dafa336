"""LLaVA-1.5 in transformers: a CLIP or SigLIP tower, N = H W tokens an image."""

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


class LlavaHost(ClipFamilyHost):
    """LLaVA-1.5 and models of its architecture.

    Raises:
        ValueError: for other towers than CLIP and SigLIP, and for settings under which the tokens
            are no grid.
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
    def image_tokens(self) -> int:
        return math.prod(self.grid_hw)

    def encode(self, images: dict[str, Any], needs: Needs) -> Encoded:
        output, found, later = self._look_inside(images, needs)
        rows = output.pooler_output
        features = found["features"]
        num_images, num_tokens = features.shape[:2]
        embeddings = self._rows(rows, later, features)
        grid = self._grid(images["pixel_values"], num_tokens)
        if needs.projected:
            found["projected"] = torch.stack(list(rows))
        places = torch.arange(num_images * num_tokens, device=features.device)
        places, given = places.view(num_images, num_tokens), None
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
        keep = selection.keep_indices
        return self._kept(encoded, selection, encoded.places.to(keep.device).gather(1, keep))

    def tokens_of_rows(self, encoded: Encoded) -> Tensor:
        assert isinstance(encoded, Placed)
        return numbers_of_rows(encoded.places, len(encoded.embeddings))

    def cells(self, encoded: Encoded) -> Tensor:
        assert isinstance(encoded, Placed)
        places, (height, width) = encoded.places.cpu(), encoded.tokens.grid_hw
        return places.masked_fill(places >= height * width, -1)
