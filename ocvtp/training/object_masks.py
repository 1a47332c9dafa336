"""Which tokens show annotated objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ocvtp.hosts.base import Host
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.hosts.prompt.read_call import look
from ocvtp.hosts.sight import cell_pixels, sight_of_host
from ocvtp.structures import Needs, VisualTokens


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


class _Layout(NamedTuple):
    """The grids that an image becomes, and the cell of each of its N tokens, -1 for none."""

    grids: tuple[tuple[int, int], ...]
    cells: NDArray[np.int64]


class ObjectsOnTokens:
    """How much of the area of each visual token shows the objects that a question is about.

    What the processor crops away does not count. An image in tiles becomes two grids, that of the
    whole view and that of the tiles put together, which is taken for the whole image: a border that
    the tiles have may shift it by part of a token.

    Sizes of images are looked at once each, with a call of the vision tower.

    Args:
        host: of the model.
        processor: of the model, that made its inputs.
    """

    def __init__(self, host: Host, processor: Any) -> None:
        self.host = type(host)(host.model, host.tiling)  # without what acts inside the tower
        self.processor = processor
        self._sight = sight_of_host(host, getattr(processor, "image_processor", processor))
        self._layouts: dict[tuple[int, int], _Layout] = {}

    def __call__(
        self, objects: Sequence[NDArray[np.bool_] | None], tokens: VisualTokens
    ) -> tuple[Tensor, Tensor]:
        """The shares.

        Args:
            objects: of each of B images [h, w], whether there is an object; None if nobody says.
            tokens: of these images.

        Returns:
            [B, N] in 0..1, 0 on padding, and [B] bool, whether any object is in the picture.

        Raises:
            ValueError: if the tokens are not one row for each image, all of it.
        """
        if len(objects) != tokens.batch_size:
            raise ValueError(
                f"there are objects of {len(objects)} images, but tokens of {tokens.batch_size};"
                " pass one image a row, and tiles with the budget per_image."
            )
        shares = torch.zeros(tokens.batch_size, tokens.num_tokens)
        for row, (own, real) in enumerate(zip(objects, tokens.real.cpu(), strict=True)):
            if own is None:
                continue
            share = self._share(own)
            if len(share) != int(real.sum()):
                raise ValueError(
                    f"an image of {own.shape[1]} x {own.shape[0]} pixels becomes {len(share)}"
                    f" tokens, but {int(real.sum())} were given; pass the processor that made the"
                    " inputs, and tokens of which none was dropped."
                )
            shares[row, real] = torch.from_numpy(share)
        device = tokens.features.device
        return shares.to(device), (shares > 0).any(dim=1).to(device)

    def _share(self, objects: NDArray[np.bool_]) -> NDArray[np.float32]:
        """[N] of one image."""
        size = objects.shape[1], objects.shape[0]
        if size not in self._layouts:
            self._layouts[size] = self._look(size)
        (whole, *tiled), cells = self._layouts[size]
        pixels, area = cell_pixels(self._sight.seen(objects[None], size), whole, self._sight.patch)
        parts = [pixels[0] / area, *(_area_mean(objects, grid).flatten() for grid in tiled)]
        shares = np.concatenate(parts).astype(np.float32)[cells.clip(min=0)]
        return np.where(cells < 0, np.float32(0), shares)

    @torch.no_grad()
    def _look(self, size: tuple[int, int]) -> _Layout:
        """What an image of this width and height becomes."""
        made = self.processor(
            images=[[_sheet(size)]],
            text=[with_template(self.processor, "?", 1)],
            return_tensors="pt",
        ).to(self.host.model.device, self.host.model.dtype)
        hooks = self.host.install(Needs())
        try:
            encoded = look(self.host, Needs(), dict(made)).encoded
        finally:
            for hook in hooks:
                hook.remove()
        cells = self.host.cells(encoded)[0][encoded.tokens.real[0].cpu()]
        return _Layout(self.host.grids(encoded), cells.numpy())


def _sheet(size: tuple[int, int]) -> Image.Image:
    """An image of this width and height no two parts of which are alike: they may be compared."""
    across, down = (np.linspace(0, 255, length).astype(np.uint8) for length in size)
    red, green = np.broadcast_arrays(across, down[:, None])
    return Image.fromarray(np.stack([red, green, red // 2 + green // 2], axis=2))


def _area_mean(values: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.float64]:
    """[h, w] -> [rows, columns] means over equal cells, which may cut through pixels."""
    rows, columns = (_overlap(*pair) for pair in zip(grid, values.shape, strict=True))
    return np.asarray(rows @ values @ columns.T)


def _overlap(cells: int, pixels: int) -> NDArray[np.float64]:
    """[cells, pixels] part of each cell of a line that is each pixel's."""
    edges = np.arange(cells + 1)[:, None] * (pixels / cells)
    starts = np.arange(pixels)
    ends = np.minimum(edges[1:], starts + 1)
    part: NDArray[np.float64] = ends - np.maximum(edges[:-1], starts)
    return part.clip(min=0) * (cells / pixels)
