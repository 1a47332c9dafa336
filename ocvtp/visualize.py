"""Pictures of what pruners keep and of what slots look at.

H x W pixels of an image, N = h w visual tokens (row by row), K kept, S slots. A token's patch is the
rectangle of pixels it covers; sides need not be multiples of the grid. Figures are drawn on their
own Agg canvas: nothing here touches pyplot or matplotlib's global state.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Image = NDArray[np.uint8]
"""[H, W, 3] RGB."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_OUTLINE = (255, 196, 0)
_METADATA: dict[str, dict[str, None]] = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}
"""Suffixes `save_figure` writes, and what it leaves out so that equal figures are equal files."""


@dataclass(frozen=True)
class Panel:
    """What one pruner does to an image.

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
    kept = _keep_mask(keep_indices, grid_hw)
    cells = _cells(pixels.shape[:2], grid_hw)  # [H, W]
    grey = pixels @ np.asarray(_LUMA)  # [H, W]
    dim = 0.3 * (0.8 * grey[..., None] + 0.2 * pixels)  # [H, W, 3]
    bright = kept[cells]
    picture = np.where(bright[..., None], pixels, dim)
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
    winner = attention.detach().argmax(dim=0).cpu().numpy()  # [N]
    slots = winner[_cells(pixels.shape[:2], grid_hw)]  # [H, W]
    picture = 0.45 * pixels + 0.55 * slot_palette(len(attention))[slots]
    picture[_border(slots, grid_hw)] = 255
    return picture.round().astype(np.uint8)


def figure(
    image: ArrayLike, panels: Sequence[Panel], *, max_columns: int = 5, tile_inches: float = 2.8
) -> Figure:
    """The image, then each panel's kept tokens and slot masks, in rows of equal length.

    Args:
        image: [H, W, 3] uint8, anything numpy reads.
        panels: one a pruner.
        max_columns: most pictures in a row.
        tile_inches: side of a square picture; others have about the same area.

    Returns:
        A figure for `save_figure`, or for a logger.

    Raises:
        ValueError: if the image is no uint8 RGB image, a panel does not fit its grid or
            `max_columns` is below 1.
    """
    if max_columns < 1:
        raise ValueError(f"max_columns={max_columns} is below 1; pass at least 1.")
    pixels = _check_image(image)
    tiles = [("input", pixels), *(tile for panel in panels for tile in _tiles(pixels, panel))]
    rows = math.ceil(len(tiles) / max_columns)
    columns = math.ceil(len(tiles) / rows)
    stretch = math.sqrt(pixels.shape[1] / pixels.shape[0])
    width = min(max(stretch, 0.8), 2.0) * tile_inches
    height = width * pixels.shape[0] / pixels.shape[1]
    drawing = Figure(figsize=(columns * width, rows * (height + 0.3)), layout="constrained")
    FigureCanvasAgg(drawing)
    drawing.get_layout_engine().set(w_pad=0.04, h_pad=0.04, wspace=0, hspace=0)
    axes = drawing.subplots(rows, columns, squeeze=False).flat
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, picture) in zip(axes, tiles, strict=False):
        axis.imshow(picture, interpolation="lanczos")
        size = min(10.0, 110 * width / len(title))  # points: a character is about half as wide
        axis.set_title(title, fontsize=size, pad=4)
    return drawing


def save_figure(drawing: Figure, path: str | Path, *, dpi: int = 160) -> Path:
    """Write a figure to a PNG or PDF file, whole or not at all; folders are made as needed.

    Args:
        drawing: from `figure`.
        path: the suffix, `.png` or `.pdf`, is the format.
        dpi: pixels an inch.

    Returns:
        The path.

    Raises:
        ValueError: for another suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _METADATA:
        raise ValueError(
            f"cannot write {path.name!r}: the suffix is {path.suffix!r}; "
            f"use one of {', '.join(_METADATA)}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{suffix}")
    try:
        drawing.savefig(temporary, format=suffix[1:], dpi=dpi, metadata=_METADATA[suffix])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


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
        [2 H + gap, min(B, max_images) (W + gap) - gap, 3] uint8.

    Raises:
        ValueError: if the shapes do not fit together or no image is to be drawn.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or attention.ndim != 3:
        raise ValueError(
            f"pixel_values {list(pixel_values.shape)} and attention {list(attention.shape)} do "
            "not fit; pass [B, 3, H, W] and [B, S, N]."
        )
    count = min(len(pixel_values), len(attention), max_images)
    if count < 1:
        raise ValueError(f"no image to draw (max_images={max_images}); pass at least one.")
    scaled = pixel_values[:count].detach().float().clamp(0, 1).mul(255).round()
    images = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
    masks = [draw_slot_masks(i, a, grid_hw) for i, a in zip(images, attention, strict=False)]
    gap = 4
    tiles = np.stack([images, np.stack(masks)])  # [2, B, H, W, 3]
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    rows, _, high, wide, _ = tiles.shape
    picture = tiles.transpose(0, 2, 1, 3, 4).reshape(rows * high, count * wide, 3)
    return np.ascontiguousarray(picture[:-gap, :-gap])


@lru_cache(maxsize=8)
def slot_palette(num_slots: int) -> Image:
    """[S, 3] colours as far apart as can be: farthest-point picks in OKLab, vivid ones only.

    OKLab (Ottosson 2020, https://bottosson.github.io/posts/oklab) measures how different colours
    look. Each colour is picked given those before it, so a longer palette begins with a shorter one.
    Repeats after about 1,500 slots.
    """
    levels = np.linspace(0, 1, 16)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    vivid = (chroma > 0.09) & (lab[:, 0] > 0.42) & (lab[:, 0] < 0.88)
    rgb, lab = rgb[vivid], lab[vivid]
    picks = [int(lab[:, 2].argmin())]  # the bluest
    distance = np.full(len(lab), np.inf)
    for _ in range(min(num_slots, len(lab)) - 1):
        distance = np.minimum(distance, np.linalg.norm(lab - lab[picks[-1]], axis=1))
        picks.append(int(distance.argmax()))
    palette = (255 * rgb[np.resize(picks, num_slots)]).round().astype(np.uint8)
    palette.flags.writeable = False  # shared by the cache
    return palette


def _oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., 3] sRGB in 0..1 to OKLab."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    lab: NDArray[np.float64] = np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
    return lab


def _tiles(pixels: Image, panel: Panel) -> list[tuple[str, Image]]:
    """Titles and pictures of a panel."""
    tiles = []
    if panel.keep is not None:
        total = math.prod(panel.grid_hw)
        kept = int(_keep_mask(panel.keep, panel.grid_hw).sum())
        picture = draw_kept_tokens(pixels, panel.keep, panel.grid_hw)
        tiles.append((f"{panel.title}  {kept} of {total} tokens", picture))
    if panel.attention is not None:
        picture = draw_slot_masks(pixels, panel.attention, panel.grid_hw)
        tiles.append((f"{panel.title}  {len(panel.attention)} slots", picture))
    return tiles


def _check_image(image: ArrayLike) -> Image:
    """The image as an array."""
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"image is {pixels.dtype} {list(pixels.shape)}; pass uint8 [H, W, 3].")
    return pixels


def _keep_mask(keep: Tensor, grid_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """[N] bool from a mask or indices."""
    total = math.prod(grid_hw)
    given = keep.detach().cpu().numpy()
    if given.dtype == np.bool_ and given.shape == (total,):
        return given
    integers = given.ndim == 1 and given.dtype.kind in "iu"
    if not integers or ((given < 0) | (given >= total)).any():
        raise ValueError(
            f"kept tokens {keep.dtype} {list(keep.shape)} do not fit the grid {tuple(grid_hw)}; "
            f"pass indices [K] in 0..{total - 1} or a bool mask [{total}]."
        )
    mask = np.zeros(total, dtype=np.bool_)
    mask[given] = True
    return mask


def _cells(size_hw: tuple[int, ...], grid_hw: tuple[int, int]) -> NDArray[np.int64]:
    """[H, W] token of each pixel."""
    rows, columns = (np.arange(s) * g // s for s, g in zip(size_hw, grid_hw, strict=True))
    return rows[:, None] * grid_hw[1] + columns


def _border(region: NDArray[Any], grid_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """[H, W] bool: pixels a line's width from another region or from the edge of the image.

    The line is a fourteenth of a patch; patches below 4 pixels would drown in it and get none.
    """
    height, width = region.shape
    patch = min(height / grid_hw[0], width / grid_hw[1])
    line = max(round(patch / 14), 1) if patch >= 4 else 0
    padded = np.pad(region.astype(np.int64), line, constant_values=-1)
    shifts = ((0, line), (2 * line, line), (line, 0), (line, 2 * line))
    moved = [padded[y : y + height, x : x + width] for y, x in shifts]
    return np.any([other != region for other in moved], axis=0)
