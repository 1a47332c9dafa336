"""Pictures of what pruners keep and of what slots look at.

H x W are the pixels of an image here, h x w its token grid: N = h w, row by row. A token's patch is
the rectangle of pixels it covers; sides need not be multiples of the grid. Figures are drawn on
their own Agg canvas: nothing here touches pyplot or matplotlib's global state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchvision.utils import make_grid

from ocvtp.reporting.figure_files import save_figure as save_figure

Image = NDArray[np.uint8]
"""[H, W, 3] RGB."""

_OUTLINE = (255, 196, 0)
_HIDDEN = 190  # the grey in the place of an image


@dataclass(frozen=True)
class Panel:
    """What one pruner does with an image.

    Args:
        title: name of the pruner.
        keep: [N] bool mask or [K] indices of the kept tokens; None if there is nothing to show.
        attention: [S, N] slot masks; None for pruners without slots.
        grid_hw: rows and columns of the token grid.

    Raises:
        ValueError: if neither `keep` nor `attention` is given.
    """

    title: str
    keep: Tensor | None
    attention: Tensor | None
    grid_hw: tuple[int, int]

    def __post_init__(self) -> None:
        if self.keep is None and self.attention is None:
            raise ValueError(f"panel {self.title!r} is empty; pass keep, attention or both.")


def draw_kept_tokens(image: ArrayLike, keep_indices: Tensor, grid_hw: tuple[int, int]) -> Image:
    """Kept patches as they are in a thin outline, the dropped ones dim and grey.

    Args:
        image: [H, W, 3] uint8, anything numpy reads.
        keep_indices: [K] indices, or [N] bool mask.
        grid_hw: rows and columns of the token grid.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ValueError: if the image is no uint8 RGB image or the tokens do not fit the grid.
    """
    pixels = _check_image(image)
    bright = _keep_mask(keep_indices, grid_hw)[_cells(pixels, grid_hw)]  # [H, W]
    picture: NDArray[Any] = np.where(bright[..., None], pixels, 0.35 * _fade(pixels))
    picture[bright & _border(bright, grid_hw)] = _OUTLINE
    return picture.round().astype(np.uint8)


def draw_slot_masks(image: ArrayLike, attention: Tensor, grid_hw: tuple[int, int]) -> Image:
    """Each token in the colour of its strongest slot, over the image, white between slots.

    Slot k has the same colour in every picture, however many slots there are.

    Args:
        image: [H, W, 3] uint8, anything numpy reads.
        attention: [S, N] slot masks.
        grid_hw: rows and columns of the token grid.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ValueError: if the image is no uint8 RGB image or `attention` does not fit the grid.
    """
    pixels = _check_image(image)
    if attention.ndim != 2 or attention.shape[1] != math.prod(grid_hw):
        raise ValueError(
            f"attention {list(attention.shape)} does not fit the grid {tuple(grid_hw)}; "
            f"pass [S, {math.prod(grid_hw)}]."
        )
    slots = attention.argmax(dim=0).cpu().numpy()[_cells(pixels, grid_hw)]  # [H, W]
    picture: NDArray[Any] = 0.4 * _fade(pixels) + 0.6 * slot_palette(len(attention))[slots]
    picture[_border(slots, grid_hw)] = 255
    return picture.round().astype(np.uint8)


def draw_scores(image: ArrayLike, scores: Tensor, grid_hw: tuple[int, int]) -> Image:
    """Patches in the colours of their scores' ranks, from dark (the least) to bright, over grey.

    Ranks, as scores are compared within an image alone: any scale looks the same.

    Args:
        image: [H, W, 3] uint8, anything numpy reads.
        scores: [N].
        grid_hw: rows and columns of the token grid.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ValueError: if the image is no uint8 RGB image or the scores do not fit the grid.
    """
    pixels = _check_image(image)
    if scores.shape != (math.prod(grid_hw),):
        raise ValueError(
            f"scores {list(scores.shape)} do not fit the grid {tuple(grid_hw)}; pass"
            f" [{math.prod(grid_hw)}]."
        )
    ranks = scores.argsort().argsort().cpu().numpy() / max(len(scores) - 1, 1)
    colours = 255 * colormaps["viridis"](ranks)[:, :3]
    picture: NDArray[Any] = 0.35 * _fade(pixels) + 0.65 * colours[_cells(pixels, grid_hw)]
    return picture.round().astype(np.uint8)


def figure(
    image: ArrayLike,
    panels: Sequence[Panel],
    *,
    max_columns: int = 5,
    tile_inches: float = 2.8,
    hide_image: bool = False,
) -> Figure:
    """The image, then each panel's kept tokens and slot masks, in rows of equal length.

    Args:
        image: [H, W, 3] uint8, anything numpy reads.
        panels: one a pruner.
        max_columns: most pictures in a row.
        tile_inches: side of a square picture; others have about the same area.
        hide_image: whether panels are drawn on grey and the image is left out, so that the figure
            holds none of its pixels.

    Returns:
        A figure for `save_figure`, or for a logger.

    Raises:
        ValueError: if the image is no uint8 RGB image, a panel does not fit its grid,
            `max_columns` is below 1, or an image is hidden and has no panel.
    """
    if max_columns < 1:
        raise ValueError(f"max_columns={max_columns}; pass at least 1.")
    tiles = _tiles_of_image(image, panels, hide_image)
    num_rows = math.ceil(len(tiles) / max_columns)
    columns = math.ceil(len(tiles) / num_rows)
    rows = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    return _figure_of_rows(rows, tile_inches)


def figure_of_images(
    pictures: Sequence[tuple[ArrayLike, Sequence[Panel]]],
    *,
    tile_inches: float = 2.8,
    hide_image: bool = False,
) -> Figure:
    """Several images, each with its panels' kept tokens and slot masks in one row.

    Args:
        pictures: images and their panels, see `figure`; at least one.
        tile_inches: side of a square picture. hide_image: see `figure`.

    Returns:
        A figure for `save_figure`, or for a logger.

    Raises:
        ValueError: as `figure`.
    """
    rows = [_tiles_of_image(*one, hide_image) for one in pictures]
    return _figure_of_rows(rows, tile_inches)


def _figure_of_rows(rows: Sequence[Sequence[tuple[str, Image]]], tile_inches: float) -> Figure:
    """Titles and pictures; those of a row have one shape."""
    columns = max(map(len, rows))
    aspects = [row[0][1].shape[1] / row[0][1].shape[0] for row in rows]
    width = min(max(math.sqrt(max(aspects)), 0.8), 2.0) * tile_inches
    heights = [width / aspect + 0.3 for aspect in aspects]
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04, wspace=0, hspace=0)  # inches
    drawing = Figure(figsize=(columns * width, sum(heights)), layout=layout)
    FigureCanvasAgg(drawing)
    shape = {"height_ratios": heights}
    axes = drawing.subplots(len(rows), columns, squeeze=False, gridspec_kw=shape)
    for axis in axes.ravel():
        axis.set_axis_off()
    for row, places in zip(rows, axes, strict=True):
        for (title, picture), axis in zip(row, places, strict=False):
            axis.imshow(picture, interpolation="lanczos")
            size = min(10.0, 110 * width / len(title))  # points: a character is about half as wide
            axis.set_title(title, fontsize=size, pad=4)
    return drawing


def slot_picture(
    pixel_values: Tensor, attention: Tensor, grid_hw: tuple[int, int], max_images: int = 8
) -> Image:
    """A row of images above the row of their slot masks, for training loggers.

    Args:
        pixel_values: [B, 3, H, W] in 0..1, not normalised.
        attention: [B, S, N] slot masks.
        grid_hw: rows and columns of the token grid.
        max_images: most images drawn, the first ones.

    Returns:
        [H', W', 3] uint8, 4 white pixels around each picture.

    Raises:
        ValueError: if the shapes do not fit together or no image is to be drawn.
    """
    shape = (len(attention), 3, *pixel_values.shape[2:])
    if pixel_values.ndim != 4 or attention.ndim != 3 or pixel_values.shape != shape:
        raise ValueError(
            f"pixel_values {list(pixel_values.shape)} and attention {list(attention.shape)} do "
            "not fit; pass [B, 3, H, W] and [B, S, N]."
        )
    count = min(len(attention), max_images)
    if count < 1:
        raise ValueError(f"no image to draw: B={len(attention)}, max_images={max_images}; pass 1.")
    scaled = pixel_values[:count].detach().float().clamp(0, 1).mul(255).round()
    images = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
    masks = [draw_slot_masks(i, a, grid_hw) for i, a in zip(images, attention[:count], strict=True)]
    tiles = torch.from_numpy(np.concatenate([images, masks]))  # [2 B, H, W, 3]
    picture = make_grid(tiles.permute(0, 3, 1, 2), nrow=count, padding=4, pad_value=255)
    return np.asarray(picture.permute(1, 2, 0).contiguous())


@lru_cache(maxsize=8)
def slot_palette(num_slots: int) -> Image:
    """[S, 3] colours as far apart as can be: farthest-point picks in OKLab, vivid ones only.

    OKLab (Ottosson 2020, https://bottosson.github.io/posts/oklab) measures how different colours
    look. Each colour is picked given those before it, so a longer palette begins with a shorter
    one. Repeats after about 1,800 slots.
    """
    levels = np.linspace(0, 1, 16)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    vivid = (chroma > 0.09) & (chroma < 0.21) & (lab[:, 0] > 0.45) & (lab[:, 0] < 0.88)
    rgb, lab = rgb[vivid], lab[vivid]
    picks = [int(lab[:, 2].argmin())]  # the bluest
    distance = np.full(len(lab), np.inf)
    for _ in range(min(num_slots, len(lab)) - 1):
        distance = np.minimum(distance, np.linalg.norm(lab - lab[picks[-1]], axis=1))
        picks.append(int(distance.argmax()))
    palette: Image = (255 * rgb[np.resize(picks, num_slots)]).round().astype(np.uint8)
    palette.flags.writeable = False  # shared by the cache
    return palette


def _oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., 3] sRGB in 0..1 to OKLab."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    cones = [[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]]
    opponents = [[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]]
    return np.asarray(np.cbrt(linear @ np.array(cones)) @ np.array(opponents))


def _tiles_of_image(
    image: ArrayLike, panels: Sequence[Panel], hide_image: bool
) -> list[tuple[str, Image]]:
    """The image, and the tiles of its panels; those alone, on grey, where it is hidden."""
    pixels = _check_image(image)
    if not hide_image:
        return [("input", pixels), *(tile for panel in panels for tile in _tiles(pixels, panel))]
    if not panels:
        raise ValueError("hide_image leaves nothing to draw of an image without panels; pass one.")
    blank = np.full_like(pixels, _HIDDEN)
    return [tile for panel in panels for tile in _tiles(blank, panel)]


def _tiles(pixels: Image, panel: Panel) -> list[tuple[str, Image]]:
    """Titles and pictures of a panel."""
    tiles = []
    if panel.keep is not None:
        mask = _keep_mask(panel.keep, panel.grid_hw)
        title = f"{panel.title}  {mask.sum()} of {mask.size} tokens"
        tiles.append((title, draw_kept_tokens(pixels, panel.keep, panel.grid_hw)))
    if panel.attention is not None:
        title = f"{panel.title}  {len(panel.attention)} slots"
        tiles.append((title, draw_slot_masks(pixels, panel.attention, panel.grid_hw)))
    return tiles


def _check_image(image: ArrayLike) -> Image:
    """The image as an array."""
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"image is {pixels.dtype} {list(pixels.shape)}; pass uint8 [H, W, 3].")
    return pixels


def _fade(pixels: Image) -> NDArray[np.float64]:
    """[H, W, 3] with a fifth of the colour left."""
    grey = pixels @ np.array([0.299, 0.587, 0.114])  # [H, W], ITU-R BT.601
    return np.asarray(0.8 * grey[..., None] + 0.2 * pixels)


def _keep_mask(keep: Tensor, grid_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """[N] bool from a mask or indices."""
    total = math.prod(grid_hw)
    given = keep.detach().cpu().numpy()
    if given.dtype == np.bool_ and given.shape == (total,):
        return given
    if given.ndim != 1 or given.dtype.kind not in "iu" or ((given < 0) | (given >= total)).any():
        raise ValueError(
            f"kept tokens {keep.dtype} {list(keep.shape)} do not fit the grid {tuple(grid_hw)}; "
            f"pass indices [K] in 0..{total - 1} or a bool mask [{total}]."
        )
    mask = np.zeros(total, dtype=np.bool_)
    mask[given] = True
    return mask


def _cells(pixels: Image, grid_hw: tuple[int, int]) -> NDArray[np.intp]:
    """[H, W] token of each pixel."""
    rows, columns = (np.arange(s) * g // s for s, g in zip(pixels.shape, grid_hw, strict=False))
    return np.asarray(rows[:, None] * grid_hw[1] + columns)


def _border(region: NDArray[Any], grid_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """[H, W] bool: pixels within a line's width of another region.

    The line is a fourteenth of a patch; patches below 4 pixels would drown in it and get none.
    """
    height, width = region.shape
    patch = min(height / grid_hw[0], width / grid_hw[1])  # pixels
    line = max(round(patch / 14), 1) if patch >= 4 else 0
    padded = np.pad(region, line, mode="edge")
    shifts = ((0, line), (2 * line, line), (line, 0), (line, 2 * line))
    moved = [padded[y : y + height, x : x + width] for y, x in shifts]
    return np.asarray(np.any([other != region for other in moved], axis=0))
