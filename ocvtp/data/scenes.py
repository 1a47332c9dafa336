"""Drawn scenes of several objects with exact masks, written in COCO's own layout.

Scene i of a seed is always the same image, whatever the number of scenes. H = W = `size` pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ocvtp.choices import Level, Split
from ocvtp.data.drawing import (
    COLOURS,
    OUTLINES,
    SHAPES,
    UNIT,
    Array,
    background,
    blend,
    coverage,
    draw_clutter,
    tinted,
)
from ocvtp.data.masks import write_mask
from ocvtp.data.resize import claim_folder
from ocvtp.images import encoded
from ocvtp.reporting.files import replacing, write_whole
from ocvtp.reporting.progress import tracked

VERSION = 1  # of the drawing: another with every change, so that two drawings are never mixed
MIN_SIZE = 48
MAX_SEED = 2**31


@dataclass(frozen=True)
class SceneStyle:
    """How hard a scene is to read; lengths in pixels of a 96 px image.

    Args:
        small: least and greatest extent of a small object.
        large: the same of a large one.
        large_share: part of the objects that is large.
        clutter: least and greatest number of grey things in the background.
        noise: half range of the noise over everything, in grey levels of 255.
        num_objects: least and greatest number of objects.
        distractors: least and greatest number of rings, bars and speckles in the objects' colours.
    """

    small: tuple[int, int] = (11, 13)
    large: tuple[int, int] = (20, 24)
    large_share: float = 0.45
    clutter: tuple[int, int] = (2, 5)
    noise: int = 8
    num_objects: tuple[int, int] = (3, 6)
    distractors: tuple[int, int] = (0, 0)


LEVELS: dict[Level, SceneStyle] = {
    "easy": SceneStyle(),
    "hard": SceneStyle(
        small=(9, 12), large=(19, 23), large_share=0.25, num_objects=(6, 12), distractors=(8, 15)
    ),
}


def scene_style(level: str) -> SceneStyle:
    """How scenes of a level are drawn.

    Raises:
        ValueError: if there is no such level.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is unknown; pass one of {list(LEVELS)}.")
    return LEVELS[level]


def split_seed(split: str, seed: int) -> int:
    """The seed of `draw_scene` for a split: no two splits share a scene, whatever their seeds.

    Nothing is tuned on `test`: it is for the figures that are reported.

    Args:
        split: `train`, `val` or `test`.
        seed: of the whole set, 0 to `MAX_SEED - 1`.

    Raises:
        ValueError: if there is no such split, or the seed is out of range.
    """
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} is unknown; pass one of {list(get_args(Split))}.")
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed={seed} is out of range; pass 0 to {MAX_SEED - 1}.")
    return {"train": 2 * seed, "val": 2 * seed + 1, "test": 2 * MAX_SEED + seed}[split]


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
    num_objects: tuple[int, int] | None = None,
    style: SceneStyle | None = None,
) -> Scene:
    """Draw scene `index` of `seed`: coloured objects apart from each other over clutter.

    Args:
        seed: of the whole set, not negative.
        index: of the scene, not negative.
        size: pixels of an edge, at least 48.
        num_objects: least and greatest number of objects; None for those of the style.
        style: how hard it is to read; None for `LEVELS["easy"]`.

    Raises:
        ValueError: if a number is out of range or so many objects do not fit.
    """
    if size < MIN_SIZE:
        raise ValueError(f"size={size} leaves objects of a few pixels; pass at least {MIN_SIZE}.")
    style = style or LEVELS["easy"]
    num_objects = num_objects or style.num_objects
    if not 1 <= num_objects[0] <= num_objects[1]:
        raise ValueError(f"num_objects={num_objects} is no range; pass 1 <= least <= greatest.")
    rng = np.random.default_rng([seed, index])
    canvas = background(rng, size)
    for _ in range(rng.integers(*style.clutter, endpoint=True)):
        draw_clutter(rng, canvas)
    if style.distractors[1]:  # else no random number is taken
        for _ in range(rng.integers(*style.distractors, endpoint=True)):
            draw_clutter(rng, canvas, coloured=True)
    places = _layout(rng, size, int(rng.integers(*num_objects, endpoint=True)), style)
    objects = tuple(_draw_object(rng, canvas, place) for place in places)
    canvas += rng.integers(2 * style.noise, size=canvas.shape, dtype=np.uint8, endpoint=True)
    canvas -= style.noise
    return Scene(canvas.clip(0, 255).astype(np.uint8), objects)


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


def _draw_object(rng: np.random.Generator, canvas: Array, place: _Place) -> SceneObject:
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    alpha = coverage(OUTLINES[shape], rng.uniform(-0.3, 0.3), place.extent)
    blend(canvas, place.x, place.y, alpha, tinted(rng, colour))
    mask = np.zeros(canvas.shape[:2], bool)
    mask[place.y : place.y + place.extent, place.x : place.x + place.extent] = alpha >= 0.5
    left, top, right, bottom = Image.fromarray(mask).getbbox() or (0, 0, 0, 0)
    box = (left, top, right - left, bottom - top)
    return SceneObject(shape, colour, place.size, box, mask)


def write_scenes(
    root: str | Path,
    num_train: int,
    num_val: int,
    size: int,
    seed: int,
    num_test: int = 0,
    level: Level = "easy",
    lossless: bool = False,
) -> None:
    """Draw scenes into COCO's layout: `train2017`, `val2017`, `annotations/instances_*.json`.

    Categories are the shapes; annotations also name `colour` and `size`. Masks are compressed RLE.
    What an interrupted call has finished is kept, and the annotation files come last.

    Args:
        root: made where absent.
        num_train: training scenes.
        num_val: validation scenes, of another stream of random numbers.
        size: pixels of an edge.
        seed: 0 to `MAX_SEED - 1`.
        num_test: test scenes, of a third stream; without any there is no `test2017`.
        level: how hard they are to read.
        lossless: PNG files, whose pixels are those that were drawn; else JPEG.

    Raises:
        ValueError: if `root` holds scenes of other settings or other images, if there is no such
            level, or if a number is out of range.
    """
    if min(num_train, num_val, num_test, seed) < 0:
        raise ValueError(
            f"{num_train=}, {num_val=}, {num_test=}, {seed=}: pass no negative numbers."
        )
    style = scene_style(level)
    draw_scene(split_seed("train", seed), 0, size, style=style)  # refuses a bad size or seed
    description = "drawn scenes" if level == "easy" else f"drawn scenes, {level}"
    info = {"description": description, "version": VERSION, "seed": seed, "size": size}
    counts: dict[Split, int] = {"train": num_train, "val": num_val}
    if num_test:
        counts["test"] = num_test
    info |= {f"num_{split}": count for split, count in counts.items()}
    if lossless:  # else as earlier versions wrote it
        info["lossless"] = True
    claim_folder(Path(root), "scenes.json", info)
    for split, count in counts.items():
        _write_split(Path(root), split, count, info, style)


def _write_split(
    root: Path, split: Split, count: int, info: dict[str, Any], style: SceneStyle
) -> None:
    folder, annotations = root / f"{split}2017", root / f"annotations/instances_{split}2017.json"
    suffix, kind = ("png", "PNG") if info.get("lossless") else ("jpg", "JPEG")
    names = [f"{i:012d}.{suffix}" for i in range(1, count + 1)]
    if annotations.is_file() and all((folder / name).is_file() for name in names):
        return
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"info": info, "licenses": [], "images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": shape} for i, shape in enumerate(SHAPES, start=1)]
    size, seed = info["size"], split_seed(split, info["seed"])
    for index, name in enumerate(tracked(names, f"draw {split} scenes", count)):
        scene = draw_scene(seed, index, size, style=style)
        if not (folder / name).is_file():
            write_whole(folder / name, encoded(Image.fromarray(scene.image), kind, quality=95))
        content["images"] += [{"id": index + 1, "file_name": name, "width": size, "height": size}]
        content["annotations"] += _annotations(scene, index + 1, len(content["annotations"]) + 1)
    with replacing(annotations) as temporary:
        temporary.write_text(json.dumps(content))


def _annotations(scene: Scene, image_id: int, first_id: int) -> Iterator[dict[str, Any]]:
    """COCO's record of every object."""
    for number, item in enumerate(scene.objects, start=first_id):
        yield {
            "id": number,
            "image_id": image_id,
            "category_id": SHAPES.index(item.shape) + 1,
            "segmentation": write_mask(item.mask),
            "area": int(item.mask.sum()),
            "bbox": list(item.box),
            "iscrowd": 0,
            "colour": item.colour,
            "size": item.size,
        }
