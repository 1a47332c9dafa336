"""COCO images and instance masks, from a folder with or without an annotation file.

H x W are an image's pixels after the transform, h x w before it.

Images that are read with masks are used in the orientation in which their pixels are stored: COCO's
masks are drawn on it. All others are turned upright, see `ocvtp.images`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ocvtp.data.annotations import CocoFile, ImageNames
from ocvtp.data.image_names import check_inside, inside
from ocvtp.data.mapped_arrays import TextArray
from ocvtp.images import IMAGE_ERRORS, read_image, read_jpeg_on

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_INSTANCES = 255
Decoder = Literal["pillow", "cuda"]


class ImageTransform(Protocol):
    """What turns an image into a host's pixel values; `encoders` has the implementations."""

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, H, W] float pixel values of an RGB image; [T, 3, H, W] where it is cut into T."""
        ...

    def instance_map(self, ids: NDArray[np.uint8]) -> Tensor:
        """[h, w] ids to [H, W] int64: same geometry, nearest neighbour, 0 outside the image."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the transform does, JSON-able."""
        ...


class CocoImages(Dataset[dict[str, Any]]):
    """The images of a COCO annotation file, in the order of their ids, or of a folder, sorted.

    An item is a dict of `pixel_values` as `transform` makes them, `image_size` (h, w), `image_id`
    int, `file_name` str (relative to `images`), `path` str (absolute) and, with instances,
    `instances` [H, W] int64: 0 background, then 1 for the largest instance, 2 for the next and so
    on. Smaller instances lie over larger ones; crowds are left out, as are objects that have a box
    alone, and all after the 255 largest. An unreadable image or mask gives `{"error": "FILE:
    reason"}` where `on_error` is `skip`: another image never takes its place.

    Args:
        images: folder of the images.
        annotations: COCO `instances` file, whose images are all used, with annotations or without;
            None for every image file (`IMAGE_SUFFIXES`) in `images` and below, numbered from 0.
        transform: the host's own image processing.
        on_error: `raise` a ValueError on an unreadable image, or `skip` it.
        with_instances: whether items have `instances`; needs `annotations`. None: where the file
            has masks at all. Images may have been resized since: masks are brought to the size of
            the stored image.
        limit: use only the first `limit` images.
        outside: whether images that the file names may lie outside of the folder, see `inside`.
        decoder: `pillow`, or `cuda`: JPEGs are decoded on the GPU, see
            `ocvtp.images.read_jpeg_on`. Processes that load them have to be spawned, not forked.

    Raises:
        ValueError: if the folder or the file is missing or holds no images, if the file is no COCO
            `instances` file or names images outside of the folder, or if an argument is out of
            range.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path | None,
        transform: ImageTransform,
        on_error: Literal["raise", "skip"] = "raise",
        with_instances: bool | None = False,
        limit: int | None = None,
        outside: bool = False,
        decoder: Decoder = "pillow",
    ) -> None:
        _check_arguments(annotations, on_error, with_instances, limit)
        self.images = Path(images)
        self.annotations = None if annotations is None else Path(annotations)
        self.transform = transform
        self.on_error = on_error
        self._outside = outside or annotations is None
        self._device = decoding_device(decoder)
        self._coco: CocoFile | None = None
        if not self.images.is_dir():
            raise ValueError(f"images folder {images} does not exist; pass a folder of images.")
        if self.annotations is None:
            names = TextArray.of(path.as_posix() for path in find_images(self.images))
            numbers = np.arange(len(names))
            records = ImageNames(numbers, names, numbers[:limit])
        else:
            coco = CocoFile(self.annotations)
            records = coco.images.names_by_id(limit)
            if with_instances or with_instances is None:
                _warn_of_boxes(coco)
            keep = coco.num_masks > 0 if with_instances is None else with_instances
            self._coco = coco if keep else None
        if not records:
            raise ValueError(_nothing_found(self.images, self.annotations))
        if not self._outside:
            for _, name in records:
                check_inside(name, self.images)
        self._records = records

    @property
    def names(self) -> list[tuple[int, str]]:
        """Image id and file name of every item."""
        return list(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_id, file_name = self._records[index]
        try:
            path = inside(self.images, file_name, self._outside)
            image = self._load(path)
        except IMAGE_ERRORS as error:
            return self._unusable(file_name, error, "replace the file")
        try:
            ids = self._instance_ids(image_id, image.size)
        except ValueError as error:
            return self._unusable(file_name, error, f"repair {self.annotations}")
        item = {
            "pixel_values": self.transform(image),
            "image_size": image.size[::-1],
            "image_id": image_id,
            "file_name": file_name,
            "path": str(path.absolute()),
        }
        if ids is not None:
            item["instances"] = self.transform.instance_map(ids)
        return item

    def _load(self, path: Path) -> Image.Image:
        """The RGB image; upright, but where masks are drawn on it."""
        if not path.is_file():
            raise FileNotFoundError(_not_there(path))
        upright = self._coco is None
        if self._device is not None:
            return read_jpeg_on(self._device, path, upright)
        return read_image(path, upright)

    def _unusable(self, file_name: str, error: BaseException, remedy: str) -> dict[str, Any]:
        """The item of an image that cannot be used; or the error is raised."""
        reason = str(error) or type(error).__name__
        if self.on_error == "skip":
            return {"error": f"{file_name}: {reason}"}
        raise ValueError(
            f"image {self.images / file_name} cannot be used: {reason}; {remedy}, or pass "
            "on_error='skip' to continue without it."
        ) from error

    def _instance_ids(self, image_id: int, size: tuple[int, int]) -> NDArray[np.uint8] | None:
        """[h, w] ids at the stored image's `size` (w, h); None without instances."""
        if self._coco is None:
            return None
        objects = self._coco.masked(image_id)
        if not objects:
            return np.zeros(size[::-1], np.uint8)
        self._coco.check_shape(image_id, size)
        ids = _draw_instances([self._coco.mask(entry) for entry in objects])
        if ids.shape == size[::-1]:
            return ids
        return np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))


def decoding_device(decoder: str) -> str | None:
    """The GPU that this process decodes images on; None where Pillow does.

    Raises:
        ValueError: if there is no such decoder, or no GPU.
    """
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder={decoder!r} is unknown; pass one of {get_args(Decoder)}.")
    if decoder == "pillow":
        return None
    if not torch.cuda.is_available():
        raise ValueError(
            "decoder='cuda' decodes images on a GPU of NVIDIA, and torch finds none here; pass"
            " decoder='pillow'."
        )
    return f"cuda:{torch.cuda.current_device()}"


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put items of `CocoImages` into a batch, unreadable images apart.

    Args:
        items: of one transform.

    Returns:
        `pixel_values` [B, 3, H, W] of the B readable images ([0, 3, 0, 0] if there is none),
        `image_sizes`, `image_ids`, `file_names` and `paths`, lists of length B, `instances`
        [B, H, W] where the items have them, and `errors`, a list of `FILE: reason` for the others.
        Pixel values and instances of different sizes are lists of length B.
    """
    good = [item for item in items if "error" not in item]
    pixels = [item["pixel_values"] for item in good]
    batch = {
        "pixel_values": stacked(pixels) if pixels else torch.empty(0, 3, 0, 0),
        "image_sizes": [item["image_size"] for item in good],
        "image_ids": [item["image_id"] for item in good],
        "file_names": [item["file_name"] for item in good],
        "paths": [item.get("path", item["file_name"]) for item in good],
        "errors": [item["error"] for item in items if "error" in item],
    }
    if good and "instances" in good[0]:
        batch["instances"] = stacked([item["instances"] for item in good])
    return batch


def stacked(images: list[Tensor]) -> Tensor | list[Tensor]:
    """Images of one size in one tensor, of several as they are."""
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


def find_images(folder: Path) -> list[Path]:
    """Image files in `folder` and below, relative to it, sorted; hidden files are left out.

    Links to folders are not followed; folders that may not be read, and links to no file, are left
    out.
    """
    found: list[tuple[str, ...]] = []
    todo: list[tuple[str, ...]] = [()] if os.path.isdir(folder) else []
    while todo:
        parents = todo.pop()
        try:
            with os.scandir(os.path.join(folder, *parents)) as entries:
                for entry in entries:  # names alone: there may be a million
                    name = entry.name
                    if entry.is_dir(follow_symlinks=False):
                        todo.append((*parents, name))
                    elif _is_image_name(name) and _is_file(entry):
                        found.append((*parents, name))
        except PermissionError:
            continue
    return [Path(*parts) for parts in sorted(found)]


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and name[0] != "."


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself leads to none, as one to nothing does
        return False


def _check_arguments(
    annotations: str | Path | None, on_error: str, with_instances: bool | None, limit: int | None
) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is unknown; pass 'raise' or 'skip'.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no image; pass at least 1, or None for all.")
    if with_instances and annotations is None:
        raise ValueError(
            "with_instances=True needs masks, but annotations=None; "
            "pass an instances_*.json file, or with_instances=False."
        )


def _nothing_found(images: Path, annotations: Path | None) -> str:
    if annotations is not None:
        return f"annotation file {annotations} lists no images; pass one that does."
    wanted = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    return f"images folder {images} holds no {wanted} files; pass a folder that does."


def _not_there(path: Path) -> str:
    """Why a file cannot be opened; `resize_folder` writes every image as .jpg."""
    other = path.with_suffix(".jpg")
    if other == path or not other.is_file():
        return "it does not exist"
    return (
        f"it does not exist under this name (looked for {path.name}), only {other.name} does: "
        "resizing writes .jpg, so `file_name` in the annotation file has to end in .jpg too"
    )


def _warn_of_boxes(coco: CocoFile) -> None:
    """Masks were asked for, and some objects have none."""
    if coco.num_masks < coco.num_objects:
        logger.warning(
            "%s: %d of %d objects have no mask (`segmentation`); their images are used without it",
            coco.path,
            coco.num_objects - coco.num_masks,
            coco.num_objects,
        )


def _draw_instances(masks: list[NDArray[np.bool_]]) -> NDArray[np.uint8]:
    """[h, w] ids, 1 for the largest instance; the smaller lie over the larger."""
    masks = sorted(masks, key=lambda mask: -int(mask.sum()))
    ids = np.zeros(masks[0].shape, np.uint8)
    for number, mask in enumerate(masks[:MAX_INSTANCES], start=1):
        ids[mask] = number
    return ids
