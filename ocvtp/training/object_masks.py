"""Which tokens show annotated objects."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ocvtp.structures import VisualTokens


def object_shares(batch: dict[str, Any], tokens: VisualTokens) -> Tensor:
    """How much of each token's patch the masks of all objects cover.

    Args:
        batch: see `ocvtp.data.coco.collate`.
        tokens: of its images.

    Returns:
        [B, N] in 0..1.

    Raises:
        ValueError: if the batch has no masks, or its images are no single grid each.
    """
    instances = batch.get("instances")
    if instances is None:
        raise ValueError(
            "the objective reads the masks of annotated objects, and the images have none; set"
            " train_instances of the data to true (with annotation files that hold"
            " masks), or objects of the objective to false."
        )
    height, width = tokens.grid_hw
    if not isinstance(instances, Tensor) or tokens.num_tokens != height * width:
        raise ValueError(
            f"masks of objects are read on one token grid for all images, here are"
            f" {tokens.num_tokens} tokens of several; set objects of the objective to false."
        )
    shown = (instances > 0).float()[:, None]  # [B, 1, H, W]
    return adaptive_avg_pool2d(shown, (height, width)).flatten(1).to(tokens.features.device)
