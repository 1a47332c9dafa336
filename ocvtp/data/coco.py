"""COCO images and instance masks, from a folder with or without an annotation file.

B images, H x W pixels after the transform, h x w pixels as stored.

Images are used in the orientation in which their pixels are stored: COCO's masks are drawn on it,
so an EXIF orientation tag is not applied.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises on a file that is missing, truncated or no image."""
MAX_INSTANCES = 255


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
    int, `file_name` str (relative to `images`) and, with instances, `instances` [H, W] int64: 0
    background, then 1 for the largest instance, 2 for the next and so on. Smaller instances lie
    over larger ones; crowds are left out, as is all after the 255 largest. An unreadable image
    gives `{"error": "FILE: reason"}` where `on_error` is `skip`: another image never takes its
    place.

    Args:
        images: folder of the images.
        annotations: COCO `instances` file, whose images are all used, with annotations or without;
            None for every jpg, jpeg, png and webp file in `images` and below, numbered from 0.
        transform: the host's own image processing.
        on_error: `raise` a ValueError on an unreadable image, or `skip` it.
        with_instances: whether items have `instances`; needs `annotations`. Images may have been
            resized since: masks are brought to the size of the stored image.
        limit: use only the first `limit` images.

    Raises:
        ValueError: if the folder or the file is missing or holds no images, if the file is no COCO
            `instances` file, or if an argument is out of range.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path | None,
        transform: ImageTransform,
        on_error: Literal["raise", "skip"] = "raise",
        with_instances: bool = False,
        limit: int | None = None,
    ) -> None:
        _check_arguments(annotations, on_error, with_instances, limit)
        self.images = Path(images)
        self.annotations = None if annotations is None else Path(annotations)
        self.transform = transform
        self.on_error = on_error
        self._coco: COCO | None = None
        if not self.images.is_dir():
            raise ValueError(f"images folder {images} does not exist; pass a folder of images.")
        if self.annotations is None:
            found = find_images(self.images)
            records = [(i, path.as_posix()) for i, path in enumerate(found)]
        else:
            content = _read_instances(self.annotations)
            records = sorted((e["id"], str(e["file_name"])) for e in content["images"])
            self._coco = _index(content) if with_instances else None
        if not records:
            raise ValueError(_nothing_found(self.images, self.annotations))
        self._records = records[:limit]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_id, file_name = self._records[index]
        try:
            image = self._load(file_name)
            ids = self._instance_ids(image_id, image.size)
        except IMAGE_ERRORS as error:
            reason = str(error) or type(error).__name__
            if self.on_error == "skip":
                return {"error": f"{file_name}: {reason}"}
            raise ValueError(
                f"image {self.images / file_name} cannot be used: {reason}; "
                f"replace the file, or pass on_error='skip' to go on without it."
            ) from error
        item = {
            "pixel_values": self.transform(image),
            "image_size": image.size[::-1],
            "image_id": image_id,
            "file_name": file_name,
        }
        if ids is not None:
            item["instances"] = self.transform.instance_map(ids)
        return item

    def _load(self, file_name: str) -> Image.Image:
        """The RGB image, in the orientation in which it is stored."""
        path = self.images / file_name
        if not path.is_file():
            raise FileNotFoundError(_not_there(path))
        with Image.open(path) as image:
            return image.convert("RGB")

    def _instance_ids(self, image_id: int, size: tuple[int, int]) -> NDArray[np.uint8] | None:
        """[h, w] ids at the stored image's `size` (w, h); None without instances."""
        if self._coco is None:
            return None
        ids = _draw_instances(self._coco, image_id)
        if ids.shape == size[::-1]:
            return ids
        if abs(ids.shape[0] * size[0] - ids.shape[1] * size[1]) > sum(ids.shape):
            raise ValueError(
                f"it is {size[0]}x{size[1]}, but {self.annotations} says "
                f"{ids.shape[1]}x{ids.shape[0]}, which is another shape: the masks do not fit"
            )
        return np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put items of `CocoImages` into a batch, unreadable images apart.

    Args:
        items: of one transform.

    Returns:
        `pixel_values` [B, 3, H, W] of the B readable images ([0, 3, 0, 0] if there is none),
        `image_sizes`, `image_ids` and `file_names`, lists of length B, `instances` [B, H, W] where
        the items have them, and `errors`, a list of `FILE: reason` for the others. Pixel values and
        instances of different sizes are lists of length B.
    """
    good = [item for item in items if "error" not in item]
    pixels = [item["pixel_values"] for item in good]
    batch = {
        "pixel_values": _together(pixels) if pixels else torch.empty(0, 3, 0, 0),
        "image_sizes": [item["image_size"] for item in good],
        "image_ids": [item["image_id"] for item in good],
        "file_names": [item["file_name"] for item in good],
        "errors": [item["error"] for item in items if "error" in item],
    }
    if good and "instances" in good[0]:
        batch["instances"] = _together([item["instances"] for item in good])
    return batch


def _together(images: list[Tensor]) -> Tensor | list[Tensor]:
    """One tensor of images of one size, else the list."""
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


def find_images(folder: Path) -> list[Path]:
    """Image files in `folder` and below, relative to it, sorted; hidden files are left out."""
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and path.is_file()
    )


def _check_arguments(
    annotations: str | Path | None, on_error: str, with_instances: bool, limit: int | None
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


def _read_instances(path: Path) -> dict[str, Any]:
    """The content of a COCO `instances` file."""
    if not path.is_file():
        raise ValueError(
            f"annotation file {path} does not exist; pass an instances_*.json file, or None to use "
            "every image of the folder."
        )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(_no_instances_file(path, f"no JSON ({error})")) from error
    if not isinstance(content, dict):
        raise ValueError(_no_instances_file(path, "no JSON object"))
    wanted = {
        "images": {"id", "file_name", "height", "width"},
        "annotations": {"id", "image_id", "segmentation"},
    }
    for name, keys in wanted.items():
        entries = content.get(name)
        if not isinstance(entries, list):
            raise ValueError(_no_instances_file(path, f"without a list {name!r}"))
        for entry in entries:
            if not isinstance(entry, dict) or not keys <= entry.keys():
                needed = ", ".join(sorted(keys))
                found = f"with entries in {name!r} that lack one of {needed}"
                raise ValueError(_no_instances_file(path, found))
            if not isinstance(entry["id"], int):
                found = f"with the id {entry['id']!r} in {name!r}, which is no integer"
                raise ValueError(_no_instances_file(path, found))
    return content


def _no_instances_file(path: Path, found: str) -> str:
    return (
        f"annotation file {path} is {found}, so no COCO instances file; pass an instances_*.json "
        "file, or None to use every image of the folder."
    )


def _index(content: dict[str, Any]) -> COCO:
    """Pycocotools' index of the file, without the lines that it prints."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _draw_instances(coco: COCO, image_id: int) -> NDArray[np.uint8]:
    """[h, w] ids, 1 for the largest instance; the smaller lie over the larger."""
    shape = (coco.imgs[image_id]["height"], coco.imgs[image_id]["width"])
    masks = [_mask(coco, a, shape) for a in coco.imgToAnns[image_id] if not a.get("iscrowd", 0)]
    masks.sort(key=lambda mask: -int(mask.sum()))
    ids = np.zeros(shape, np.uint8)
    for number, mask in enumerate(masks[:MAX_INSTANCES], start=1):
        ids[mask] = number
    return ids


def _mask(coco: COCO, annotation: dict[str, Any], shape: tuple[int, int]) -> NDArray[np.bool_]:
    number = annotation["id"]
    try:
        mask = np.asarray(coco.annToMask(annotation), dtype=bool)
    except Exception as error:  # pycocotools raises bare Exception, TypeError, KeyError, ...
        raise ValueError(f"annotation {number} has no readable mask ({error})") from error
    if mask.shape != shape:
        raise ValueError(f"annotation {number} has no readable mask (of {mask.shape}, not {shape})")
    return mask
