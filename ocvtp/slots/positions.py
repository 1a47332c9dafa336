"""Where tokens are in an image, and learnt embeddings of these places.

V views of an image (1, or a base view and its tiles); H x W places of a stored grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grids = tuple[int, int] | Tensor
"""Rows and columns of the grid that every image is, or [B, V, 2] those of each image's views."""


def token_places(grids: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Where each token is in its image.

    Args:
        grids: [B, V, 2] rows and columns of each view. Every view shows the whole image; its tokens
            are in raster order, view after view.
        num_tokens: N, with the padding after an image's own tokens.

    Returns:
        [B, N, 2] the centre of each token, down and across, as fractions of the image, in fp32; and
        [B, N] the number of its view. They mean nothing on padding.
    """
    sizes = grids.prod(dim=2)  # [B, V]
    ends = sizes.cumsum(dim=1)
    number = torch.arange(num_tokens, device=grids.device)
    view = (number[None, :, None] >= ends[:, None]).sum(dim=2).clamp(max=grids.shape[1] - 1)
    shape = grids.gather(1, view[:, :, None].expand(-1, -1, 2)).clamp(min=1)  # [B, N, 2]
    place = number - (ends - sizes).gather(1, view)
    columns = shape[:, :, 1]
    cell = torch.stack([place // columns, place % columns], dim=2)
    return (cell + 0.5) / shape, view


class PositionEmbedding(nn.Module):
    """Learnt positions of a token grid, bicubically interpolated for other grids.

    The usual treatment of a vision transformer's positions at other sizes (DINOv2, arXiv
    2304.07193): the interpolated grid covers the image as the stored one does.

    Args:
        dim: D.
        grid_hw: H, W of the stored grid, which is used as it is for images of that grid.
        num_views: V tables, one for each view of an image.
    """

    def __init__(self, dim: int, grid_hw: tuple[int, int], num_views: int = 1) -> None:
        super().__init__()
        self.grid_hw = (int(grid_hw[0]), int(grid_hw[1]))
        self.weight = nn.Parameter(torch.empty(num_views, self.grid_hw[0] * self.grid_hw[1], dim))
        nn.init.trunc_normal_(self.weight, std=1.0)

    def forward(self, grids: Grids, num_tokens: int | None = None) -> Tensor:
        """Positions [1 or B, N, D] of the tokens.

        Args:
            grids: of one grid for all images, or [B, V', 2] of views, V' at most V.
            num_tokens: N, wanted with [B, V', 2].
        """
        if not isinstance(grids, Tensor):
            if tuple(grids) == self.grid_hw:
                return self.weight[:1]
            num_tokens = grids[0] * grids[1]
            grids = torch.tensor([[[*grids]]], device=self.weight.device)
        if num_tokens is None or grids.shape[1] > len(self.weight):
            raise ValueError(
                f"grids have shape {list(grids.shape)}, num_tokens is {num_tokens}; pass [B, V, 2]"
                f" of at most {len(self.weight)} views and the number of tokens."
            )
        places, view = token_places(grids, num_tokens)
        down = _cubic_weights(places[:, :, 0], self.grid_hw[0])  # [B, N, H]
        across = _cubic_weights(places[:, :, 1], self.grid_hw[1])  # [B, N, W]
        shares = (down[:, :, :, None] * across[:, :, None]).flatten(2).to(self.weight.dtype)
        # A matrix product: its gradient is deterministic on a GPU, that of grid_sample is not.
        with torch.autocast(self.weight.device.type, enabled=False):
            found = shares @ self.weight[0]
            for number in range(1, len(self.weight)):
                own = (view == number)[:, :, None]
                found = torch.where(own, shares @ self.weight[number], found)
        return found


def _cubic_weights(places: Tensor, size: int) -> Tensor:
    """[B, N] fractions of an axis -> [B, N, size] share of each of its cells; the edges repeat."""
    cells = torch.eye(size, device=places.device)[None, :, :, None]  # one channel a cell
    down = 2 * places - 1
    shares = F.grid_sample(
        cells,
        torch.stack([torch.zeros_like(down), down], dim=2)[None],
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    )  # [1, size, B, N]
    return shares[0].permute(1, 2, 0)
