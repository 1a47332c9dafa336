"""Composites: cut-outs pasted on photographs, with the mask of what is visible of each.

Composite i of a seed and a split is always the same. S are the pixels of an edge, O the objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.data.coco import find_images
from ocvtp.data.scenes import split_seed
from ocvtp.images import open_image
from tools.photo_vlm.cutouts import Cutout, Cutouts

MOST_OBJECTS = 6
LEAST_EXTENT, MOST_EXTENT = 1 / 6, 1 / 2
LEAST_VISIBLE = 0.5
TRAIN_SHARE = 7 / 8

_SAME_AGAIN = 0.35  # of the objects after the first are of a category that is there already
_LARGEST_ZOOM = 2.0
_LEAST_CROP = 0.5
_ATTEMPTS = 20
_GAINS = (0.7, 1.3)
_MOST_DEGREES = 20
_MOST_TRIMMED = 0.25
_CACHED = 64

Split = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class Pasted:
    """An object of a composite.

    Args:
        category: of COCO.
        mask: [S, S] what is visible of it.
    """

    category: str
    mask: NDArray[np.bool_]

    @cached_property
    def area(self) -> int:
        """Visible pixels."""
        return int(self.mask.sum())

    @cached_property
    def centre(self) -> tuple[float, float]:
        """The middle of its visible pixels: x and y in parts of the picture."""
        rows, columns = self.mask.nonzero()
        return (columns.mean() + 0.5) / len(self.mask), (rows.mean() + 0.5) / len(self.mask)


@dataclass(frozen=True, eq=False)
class Composite:
    """A picture, [S, S, 3] uint8, and its objects, the one at the very back first."""

    image: NDArray[np.uint8]
    objects: tuple[Pasted, ...]


def split_photos(folder: str | Path) -> dict[Split, list[Path]]:
    """The backgrounds: of all photographs by name, the first seven eighths are for training.

    Raises:
        ValueError: if there are fewer than two.
    """
    root = Path(folder)
    paths = [root / path for path in find_images(root)] if root.is_dir() else []
    if len(paths) < 2:
        raise ValueError(f"{folder} holds {len(paths)} photographs; pass a folder of at least two.")
    num_train = min(max(round(TRAIN_SHARE * len(paths)), 1), len(paths) - 1)
    return {"train": paths[:num_train], "test": paths[num_train:]}


class Painter:
    """Draws the composites of a split.

    Those for training also turn, trim and tint their cut-outs, as there may be few.

    Args:
        cutouts: of that split.
        photos: the backgrounds of that split.
        size: S.
        seed: of the whole set.
        split: `train` or `test`.
    """

    def __init__(
        self, cutouts: Cutouts, photos: Sequence[Path], size: int, seed: int, split: Split
    ) -> None:
        self.cutouts, self.photos, self.size = cutouts, list(photos), size
        self.seed, self.varied = split_seed(split, seed), split == "train"
        self._photo = lru_cache(_CACHED)(open_image)

    def draw(self, index: int) -> Composite:
        """Composite number `index`, not negative."""
        rng = np.random.default_rng([self.seed, index])
        canvas = self._background(rng)
        masks: list[NDArray[np.bool_]] = []
        names: list[str] = []
        num_left = int(rng.integers(1, MOST_OBJECTS, endpoint=True))
        while num_left > 0 or not names:
            num_left -= 1
            cutout = self._choose(rng, names)
            if (alpha := _place(rng, canvas, cutout, masks)) is not None:
                masks = [mask & (alpha < 0.5) for mask in masks] + [alpha >= 0.5]
                names.append(cutout.category)
        objects = tuple(Pasted(*pair) for pair in zip(names, masks, strict=True))
        return Composite(canvas.round().clip(0, 255).astype(np.uint8), objects)

    def _background(self, rng: np.random.Generator) -> NDArray[np.float32]:
        photo = self._photo(self.photos[int(rng.integers(len(self.photos)))])
        side = round(rng.uniform(_LEAST_CROP, 1) * min(photo.size))
        x, y = (int(rng.integers(edge - side, endpoint=True)) for edge in photo.size)
        crop = photo.resize(
            (self.size, self.size), Image.Resampling.BICUBIC, (x, y, x + side, y + side)
        )
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(crop, np.float32).copy()

    def _choose(self, rng: np.random.Generator, names: Sequence[str]) -> Cutout:
        again = rng.random() < _SAME_AGAIN
        known = names if names and again else self.cutouts.categories
        cutouts = self.cutouts.by_category[known[int(rng.integers(len(known)))]]
        cutout = cutouts[int(rng.integers(len(cutouts)))]
        return vary(rng, cutout) if self.varied else cutout


def vary(rng: np.random.Generator, cutout: Cutout) -> Cutout:
    """The same object of other colours, turned a little, perhaps without a part at one side."""
    gains = rng.uniform(*_GAINS, size=3)
    pixels = Image.fromarray((cutout.pixels * gains).round().clip(0, 255).astype(np.uint8))
    mask = Image.fromarray(cutout.mask.astype(np.uint8) * 255)
    if rng.random() < 0.5:
        angle = rng.uniform(-_MOST_DEGREES, _MOST_DEGREES)
        pixels = pixels.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        mask = mask.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    turned = np.asarray(pixels), np.asarray(mask) >= 128
    if rng.random() < 0.3:
        axis, share = int(rng.integers(2)), rng.uniform(0, _MOST_TRIMMED)
        length = turned[1].shape[axis]
        cut = round(share * length)
        kept = slice(cut, length) if rng.random() < 0.5 else slice(0, length - cut)
        turned = (
            (turned[0][kept], turned[1][kept])
            if axis == 0
            else (turned[0][:, kept], turned[1][:, kept])
        )
    return Cutout(cutout.category, *turned) if turned[1].any() else cutout


def _place(
    rng: np.random.Generator,
    canvas: NDArray[np.float32],
    cutout: Cutout,
    masks: Sequence[NDArray[np.bool_]],
) -> NDArray[np.float32] | None:
    """Paste a cut-out where enough of every object stays visible; its opacity, [S, S].

    None where there is no such place, or nothing of it would be left at its size.
    """
    size = len(canvas)
    pixels, opacity = _resized(rng, cutout, size)
    height, width = opacity.shape
    if not (opacity >= 0.5).any():
        return None
    before = [mask.sum() for mask in masks]
    for _ in range(_ATTEMPTS):
        y, x = (int(rng.integers(size - edge, endpoint=True)) for edge in (height, width))
        there = slice(y, y + height), slice(x, x + width)
        hidden = [(mask[there] & (opacity >= 0.5)).sum() for mask in masks]
        if all(h <= (1 - LEAST_VISIBLE) * b for h, b in zip(hidden, before, strict=True)):
            alpha = np.zeros((size, size), np.float32)
            alpha[there] = opacity
            canvas[there] += opacity[..., None] * (pixels - canvas[there])
            return alpha
    return None


def _resized(
    rng: np.random.Generator, cutout: Cutout, size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A cut-out at the size of its place, perhaps mirrored: colours, and opacity 0 to 1."""
    longest = max(cutout.mask.shape)
    extent = min(rng.uniform(LEAST_EXTENT, MOST_EXTENT) * size, _LARGEST_ZOOM * longest)
    height, width = (max(1, round(extent * edge / longest)) for edge in cutout.mask.shape)
    pixels = Image.fromarray(cutout.pixels).resize((width, height), Image.Resampling.BICUBIC)
    mask = Image.fromarray(cutout.mask.astype(np.uint8) * 255)
    mask = mask.resize((width, height), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain = np.float32(rng.uniform(0.8, 1.2))
    return gain * np.asarray(pixels, np.float32), np.asarray(mask, np.float32) / np.float32(255)
