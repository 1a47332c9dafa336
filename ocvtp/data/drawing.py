"""What scenes are drawn with: outlines, textures, and laying one over the other.

H = W = the edge of an image in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

UNIT = 96  # lengths are given in pixels of an image of this size, and grow with the image
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (165, 55, 190),
    "cyan": (55, 205, 215),
}

Array = NDArray[Any]
_SUPERSAMPLING = 4


def _regular(vertices: int, radii: tuple[float, ...] = (1.0,), turn: float = 0.0) -> Array:
    """[V, 2] corners around the centre, the first at the top; `radii` are taken in turn."""
    angles = np.arange(vertices) * (2 * np.pi / vertices) - np.pi / 2 + turn
    corners: Array = np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.resize(radii, vertices)[:, None] * corners


def _cross(arm: float = 0.32) -> Array:
    """[12, 2] corners of an upright cross whose arms are `2 arm` wide."""
    quarter = np.array([(arm, -1), (arm, -arm), (1, -arm)])
    turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])


OUTLINES: dict[str, Array] = {
    "circle": _regular(48),
    "square": _regular(4, turn=np.pi / 4),
    "triangle": _regular(3),
    "star": _regular(10, radii=(1.0, 0.42)),
    "cross": _cross(),
}
SHAPES = tuple(OUTLINES)


def background(rng: np.random.Generator, size: int) -> Array:
    """[H, W, 3] float32: soft texture of three scales, striped more often than not."""
    field = np.broadcast_to(rng.uniform(70, 185) + rng.normal(0, 16, 3), (2, 2, 3))
    for cells, strength in ((5, 22), (14, 12), (40, 8)):
        grey = rng.normal(0, strength, (cells, cells, 1))
        tint = rng.normal(0, 0.35 * strength, (cells, cells, 3))
        field = _enlarge(field, cells) + grey + tint
    canvas = _enlarge(field, size)
    if rng.random() < 0.6:
        angle, wave = rng.uniform(0, np.pi), rng.uniform(0.15, 1.0) * UNIT / size
        along = np.arange(size, dtype=np.float32) * np.float32(wave)
        phase = along * np.float32(np.cos(angle)) + (along * np.float32(np.sin(angle)))[:, None]
        canvas += np.float32(rng.uniform(8, 26)) * np.sin(phase)[..., None]
    return canvas


def _enlarge(field: Array, size: int) -> Array:
    """[h, w, 3] -> [size, size, 3] float32, bilinear, rounded to grey levels."""
    image = Image.fromarray(field.clip(0, 255).astype(np.uint8))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).astype(np.float32)


def coverage(outline: Array, angle: float, extent: int) -> Array:
    """[extent, extent] part of each pixel inside the outline, turned and fitted to the square."""
    cos, sin = np.cos(angle), np.sin(angle)
    points = outline @ np.array([(cos, sin), (-sin, cos)])
    low, high = points.min(0), points.max(0)
    edge = extent * _SUPERSAMPLING
    points = (points - (low + high) / 2) / (high - low).max() * (edge - 1) + (edge - 1) / 2
    image = Image.new("L", (edge, edge))
    ImageDraw.Draw(image).polygon([(x, y) for x, y in points.tolist()], fill=255)
    return np.asarray(image.reduce(_SUPERSAMPLING)).astype(np.float32) / 255


def draw_clutter(rng: np.random.Generator, canvas: Array, coloured: bool = False) -> None:
    """Lay a ring, bar or patch of speckle over a canvas [H, W, 3], in place; objects may cover it.

    It is grey, or of one of `COLOURS`.
    """
    extent = round(rng.uniform(6, 17) * len(canvas) / UNIT)
    kind = rng.integers(3)
    if kind == 0:
        alpha = coverage(OUTLINES["circle"], 0, extent)
        edge = max(extent // 5, 1)
        alpha[edge:-edge, edge:-edge] -= coverage(OUTLINES["circle"], 0, extent - 2 * edge)
    elif kind == 1:
        alpha = coverage(OUTLINES["square"] * (1, 0.25), rng.uniform(0, np.pi), extent)
    else:
        speckle = (rng.random((5, 5, 1)) < 0.4) * np.full(3, 255)
        alpha = _enlarge(speckle, extent)[..., 0] / 255
    x, y = rng.integers(len(canvas) - extent, size=2, endpoint=True)
    grey = rng.uniform(30, 225) + rng.normal(0, 6, 3)
    shade = tinted(rng, str(rng.choice(list(COLOURS)))) if coloured else grey
    blend(canvas, int(x), int(y), alpha * np.float32(rng.uniform(0.5, 0.95)), shade)


def tinted(rng: np.random.Generator, colour: str) -> Array:
    """[3] grey levels: one of `COLOURS`, a little darker or lighter."""
    shade: Array = np.array(COLOURS[colour]) * rng.uniform(0.85, 1.1) + rng.normal(0, 8, 3)
    return shade


def blend(canvas: Array, x: int, y: int, alpha: Array, shade: Array) -> None:
    """Lay a colour over the square of `alpha` whose corner is (x, y), in place."""
    window = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    window += alpha[..., None] * (shade.astype(np.float32) - window)
