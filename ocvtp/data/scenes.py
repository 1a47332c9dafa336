"""Drawn scenes of several objects with exact masks, written in COCO's own layout.

Scene i of a seed is always the same image, whatever the number of scenes. H = W = `size` pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from ocvtp.data.resize import claim_folder, progress
from ocvtp.files import replacing

VERSION = 1  # of the drawing: another with every change, so that two drawings are never mixed
UNIT = 96  # lengths are given in pixels of an image of this size, and grow with the image
MIN_SIZE = 48
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (165, 55, 190),
    "cyan": (55, 205, 215),
}

_Array = NDArray[Any]
_SUPERSAMPLING = 4


def _regular(vertices: int, radii: tuple[float, ...] = (1.0,), turn: float = 0.0) -> _Array:
    """[V, 2] corners around the centre, the first at the top; `radii` are taken in turn."""
    angles = np.arange(vertices) * (2 * np.pi / vertices) - np.pi / 2 + turn
    corners: _Array = np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.resize(radii, vertices)[:, None] * corners


def _cross(arm: float = 0.32) -> _Array:
    """[12, 2] corners of an upright cross whose arms are `2 arm` wide."""
    quarter = np.array([(arm, -1), (arm, -arm), (1, -arm)])
    turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])


OUTLINES: dict[str, _Array] = {
    "circle": _regular(48),
    "square": _regular(4, turn=np.pi / 4),
    "triangle": _regular(3),
    "star": _regular(10, radii=(1.0, 0.42)),
    "cross": _cross(),
}
SHAPES = tuple(OUTLINES)


@dataclass(frozen=True)
class SceneStyle:
    """How hard a scene is to read; lengths in pixels of a 96 px image.

    Args:
        small: least and greatest extent of a small object.
        large: the same of a large one.
        large_share: part of the objects that is large.
        clutter: least and greatest number of grey things in the background.
        noise: half range of the noise over everything, in grey levels of 255.
    """

    small: tuple[int, int] = (11, 13)
    large: tuple[int, int] = (20, 24)
    large_share: float = 0.45
    clutter: tuple[int, int] = (2, 5)
    noise: int = 8


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One of `SHAPES` in one of `COLOURS`.

    What is visible of it is `mask`, [H, W] bool, and `box`, its x, y, width and height in pixels.
    """

    shape: str
    colour: str
    size: Literal["small", "large"]
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Scene:
    """A drawn image, [H, W, 3] uint8, and its objects."""

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


class _Place(NamedTuple):
    """Where an object goes: the corner of a square of `extent` pixels."""

    size: Literal["small", "large"]
    x: int
    y: int
    extent: int

    def clear_of(self, other: _Place, gap: int) -> bool:
        x = max(self.x, other.x) - min(self.x + self.extent, other.x + other.extent)
        y = max(self.y, other.y) - min(self.y + self.extent, other.y + other.extent)
        return max(x, y) >= gap


def draw_scene(
    seed: int,
    index: int,
    size: int = 96,
    num_objects: tuple[int, int] = (3, 6),
    style: SceneStyle | None = None,
) -> Scene:
    """Draw scene `index` of `seed`: coloured objects apart from each other over grey clutter.

    Args:
        seed: of the whole set, not negative.
        index: of the scene, not negative.
        size: pixels of an edge, at least 48.
        num_objects: least and greatest number of objects.
        style: how hard it is to read.

    Raises:
        ValueError: if a number is out of range or so many objects do not fit.
    """
    if size < MIN_SIZE:
        raise ValueError(f"size={size} leaves objects of a few pixels; pass at least {MIN_SIZE}.")
    if not 1 <= num_objects[0] <= num_objects[1]:
        raise ValueError(f"num_objects={num_objects} is no range; pass 1 <= least <= greatest.")
    style = style or SceneStyle()
    rng = np.random.default_rng([seed, index])
    canvas = _background(rng, size)
    for _ in range(rng.integers(*style.clutter, endpoint=True)):
        _draw_clutter(rng, canvas)
    places = _layout(rng, size, int(rng.integers(*num_objects, endpoint=True)), style)
    objects = tuple(_draw_object(rng, canvas, place) for place in places)
    canvas += rng.integers(2 * style.noise, size=canvas.shape, dtype=np.uint8, endpoint=True)
    canvas -= style.noise
    return Scene(canvas.clip(0, 255).astype(np.uint8), objects)


def _background(rng: np.random.Generator, size: int) -> _Array:
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


def _enlarge(field: _Array, size: int) -> _Array:
    """[h, w, 3] -> [size, size, 3] float32, bilinear, rounded to grey levels."""
    image = Image.fromarray(field.clip(0, 255).astype(np.uint8))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).astype(np.float32)


def _layout(rng: np.random.Generator, size: int, count: int, style: SceneStyle) -> list[_Place]:
    """Places of `count` objects that do not touch."""
    gap = round(size / UNIT)
    for _ in range(20):
        places: list[_Place] = []
        for _ in range(20 * count):
            large = rng.random() < style.large_share
            extent = round(rng.uniform(*(style.large if large else style.small)) * size / UNIT)
            x, y = rng.integers(size - extent, size=2, endpoint=True).tolist()
            place = _Place("large" if large else "small", x, y, extent)
            if all(place.clear_of(other, gap) for other in places):
                places.append(place)
            if len(places) == count:
                return places
    raise ValueError(f"{count} objects do not fit into a scene; pass a smaller num_objects.")


def _draw_object(rng: np.random.Generator, canvas: _Array, place: _Place) -> SceneObject:
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    alpha = _coverage(OUTLINES[shape], rng.uniform(-0.3, 0.3), place.extent)
    shade = np.array(COLOURS[colour]) * rng.uniform(0.85, 1.1) + rng.normal(0, 8, 3)
    _blend(canvas, place.x, place.y, alpha, shade)
    mask = np.zeros(canvas.shape[:2], bool)
    mask[place.y : place.y + place.extent, place.x : place.x + place.extent] = alpha >= 0.5
    left, top, right, bottom = Image.fromarray(mask).getbbox() or (0, 0, 0, 0)
    box = (left, top, right - left, bottom - top)
    return SceneObject(shape, colour, place.size, box, mask)


def _coverage(outline: _Array, angle: float, extent: int) -> _Array:
    """[extent, extent] part of each pixel inside the outline, turned and fitted to the square."""
    cos, sin = np.cos(angle), np.sin(angle)
    points = outline @ np.array([(cos, sin), (-sin, cos)])
    low, high = points.min(0), points.max(0)
    edge = extent * _SUPERSAMPLING
    points = (points - (low + high) / 2) / (high - low).max() * (edge - 1) + (edge - 1) / 2
    image = Image.new("L", (edge, edge))
    ImageDraw.Draw(image).polygon([(x, y) for x, y in points.tolist()], fill=255)
    return np.asarray(image.reduce(_SUPERSAMPLING)).astype(np.float32) / 255


def _draw_clutter(rng: np.random.Generator, canvas: _Array) -> None:
    """A grey ring, bar or patch of speckle, which objects may cover."""
    extent = round(rng.uniform(6, 17) * len(canvas) / UNIT)
    kind = rng.integers(3)
    if kind == 0:
        alpha = _coverage(OUTLINES["circle"], 0, extent)
        edge = max(extent // 5, 1)
        alpha[edge:-edge, edge:-edge] -= _coverage(OUTLINES["circle"], 0, extent - 2 * edge)
    elif kind == 1:
        alpha = _coverage(OUTLINES["square"] * (1, 0.25), rng.uniform(0, np.pi), extent)
    else:
        speckle = (rng.random((5, 5, 1)) < 0.4) * np.full(3, 255)
        alpha = _enlarge(speckle, extent)[..., 0] / 255
    x, y = rng.integers(len(canvas) - extent, size=2, endpoint=True)
    shade = rng.uniform(30, 225) + rng.normal(0, 6, 3)
    _blend(canvas, int(x), int(y), alpha * np.float32(rng.uniform(0.5, 0.95)), shade)


def _blend(canvas: _Array, x: int, y: int, alpha: _Array, shade: _Array) -> None:
    """Lay a colour over the square of `alpha` whose corner is (x, y), in place."""
    window = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    window += alpha[..., None] * (shade.astype(np.float32) - window)


def write_scenes(root: str | Path, num_train: int, num_val: int, size: int, seed: int) -> None:
    """Draw scenes into COCO's layout: `train2017`, `val2017`, `annotations/instances_*.json`.

    Categories are the shapes; annotations also name `colour` and `size`. Masks are compressed RLE.
    What an interrupted call has finished is kept, and the annotation files come last.

    Args:
        root: made where absent.
        num_train: training scenes.
        num_val: validation scenes, of another stream of random numbers.
        size: pixels of an edge.
        seed: not negative.

    Raises:
        ValueError: if `root` holds scenes of other settings or other images, or if a number is out
            of range.
    """
    if min(num_train, num_val, seed) < 0:
        raise ValueError(f"{num_train=}, {num_val=}, {seed=}: pass no negative numbers.")
    draw_scene(seed, 0, size)  # refuses a bad size before anything is written
    info = {"description": "drawn scenes", "version": VERSION, "seed": seed, "size": size}
    info |= {"num_train": num_train, "num_val": num_val}
    claim_folder(Path(root), "scenes.json", info)
    _write_split(Path(root), "train", num_train, info, 2 * seed)
    _write_split(Path(root), "val", num_val, info, 2 * seed + 1)


def _write_split(root: Path, split: str, count: int, info: dict[str, Any], seed: int) -> None:
    folder, annotations = root / f"{split}2017", root / f"annotations/instances_{split}2017.json"
    names = [f"{i:012d}.jpg" for i in range(1, count + 1)]
    if annotations.is_file() and all((folder / name).is_file() for name in names):
        return
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"info": info, "licenses": [], "images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": shape} for i, shape in enumerate(SHAPES, start=1)]
    size = info["size"]
    for index, name in enumerate(progress(names, f"draw {split} scenes", count)):
        scene = draw_scene(seed, index, size)
        if not (folder / name).is_file():
            with replacing(folder / name) as temporary:
                Image.fromarray(scene.image).save(temporary, format="JPEG", quality=95)
        content["images"] += [{"id": index + 1, "file_name": name, "width": size, "height": size}]
        content["annotations"] += _annotations(scene, index + 1, len(content["annotations"]) + 1)
    with replacing(annotations) as temporary:
        temporary.write_text(json.dumps(content))


def _annotations(scene: Scene, image_id: int, first_id: int) -> Iterator[dict[str, Any]]:
    """COCO's record of every object."""
    for number, item in enumerate(scene.objects, start=first_id):
        code = rle.encode(np.asfortranarray(item.mask, dtype=np.uint8))
        yield {
            "id": number,
            "image_id": image_id,
            "category_id": SHAPES.index(item.shape) + 1,
            "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
            "area": int(item.mask.sum()),
            "bbox": list(item.box),
            "iscrowd": 0,
            "colour": item.colour,
            "size": item.size,
        }
