"""Operations of a row as `ocvtp flops` counts them, next to those that were seen while it ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ocvtp.bench.variants import Variant
from ocvtp.flops import count


def flops_of(
    model: Any, variant: Variant, sizes: Mapping[str, int], num_images: int
) -> dict[str, int] | None:
    """Of one prompt until its first token: `tower`, `projector`, `select`, `language_model`, all.

    Args:
        model: of transformers.
        variant: the row.
        sizes: `image_tokens` and `text_tokens` of a prompt.
        num_images: of a prompt.

    Returns:
        None where they depend on what is in an image, or the model's family is not known there.
    """
    try:
        found = count(
            model,
            num_visual=sizes["image_tokens"] // num_images,
            text_length=sizes["text_tokens"],
            pruner=variant.pruner,
            num_images=num_images,
            savings=variant.savings,
        )
    except ValueError:
        return None
    parts = ("tower", "projector", "select", "language_model", "total")
    return {part: int(getattr(found, part)) for part in parts}
