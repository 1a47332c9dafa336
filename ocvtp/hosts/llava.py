"""LLaVA-1.5 in transformers: a CLIP or SigLIP tower, N = H W tokens an image.

I images, N tokens of an image, D' width of the language model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ocvtp.hosts.base import Encoded, Kept
from ocvtp.hosts.clip_family import ClipFamilyHost
from ocvtp.structures import Needs, Selection, VisualTokens


class LlavaHost(ClipFamilyHost):
    """LLaVA-1.5 and models of its architecture.

    Raises:
        ValueError: for other towers than CLIP and SigLIP, and for settings under which the tokens
            are no grid.
    """

    family: ClassVar[str] = "LLaVA"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def encode(self, images: dict[str, Any], needs: Needs) -> Encoded:
        """See `Host.encode`."""
        rows, found = self._look_inside(images, needs)
        embeddings = torch.stack(rows)  # [I, N, D']
        tokens = VisualTokens(
            grid_hw=self._grid(images["pixel_values"], embeddings.shape[1]),
            projected=embeddings if needs.projected else None,
            **found,
        )
        return Encoded(tokens, embeddings.flatten(0, 1))

    def apply(self, encoded: Encoded, selection: Selection) -> Kept:
        """See `Host.apply`."""
        images, num_tokens = encoded.tokens.features.shape[:2]
        keep = selection.keep_indices
        first = num_tokens * torch.arange(images, device=keep.device)[:, None]
        return self._kept(encoded, selection, keep + first)

    def _check_settings(self, images: dict[str, Any], needs: Needs) -> None:
        super()._check_settings(images, needs)
        if images.get("image_sizes") is not None:
            raise ValueError("image_sizes belong to Pixtral towers; leave them out.")
