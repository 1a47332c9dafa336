"""What is kept of images, measured without an answer: objects covered, and tokens restored.

H x W are the pixels of a picture as the vision tower saw it, h x w those of the image as stored,
O its objects. A visual token is one cell of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ocvtp.data.annotations import CocoFile
from ocvtp.data.coco import CocoImages
from ocvtp.evaluation.tasks.base import Item, PlaceTask, Ratio, Record, Supplied
from ocvtp.evaluation.tasks.kept_tokens import (
    KeptTokens,
    kept_of_prompt,
    nearest_kept,
    unrestored,
)
from ocvtp.evaluation.tasks.object_cells import at_pixels, cells_on
from ocvtp.evaluation.tasks.registry import register_task
from ocvtp.hosts.base import Host
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.reporting.results_files import current_names

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
"""COCO's: least area, and the area from which on it is another, in pixels of the original image."""


@register_task("coverage")
class CoverageTask(PlaceTask):
    """Object coverage, nearest-kept cosine and the unrestored share on a COCO file's images.

    Nothing is generated: the runner shows `look` what a pruner kept in a model, and `judge` what it
    kept of a vision tower alone. Figures:

    - `coverage/small`, `/medium`, `/large` and `/all`: share of the objects with a kept token on
      them, see `cells_on`. Crowds do not count, nor objects of which the picture shows nothing
      since they were cropped away, or are smaller than a pixel of it.
    - `cosine`: mean over all N tokens of the largest cosine to a kept one, see `nearest_kept`.
    - `unrestored`: share of the tokens' energy that ridge regression does not restore from the
      kept ones, see the function of this name.

    All three are of places: merged tokens stand at their anchors, with the anchors' own features.
    Features are those of the selected layer of the whole tower, also where a pruner drops tokens
    inside it. Where tokens are dropped inside the language model, those count as kept that reach
    its last layer.

    Args:
        images: folder of the images, or several. annotations: COCO `instances` file of each, in the
            same order; areas are read from it, or counted where it has none. Objects without a mask
            do not count.
        processor: of the model (or its image processor): says where the pixels of an image went;
            None for a vision tower alone, whose own transform says it.
        question: what pruners that read the prompt are told.
        limit: use only the first `limit` images of all.
        outside: whether images may lie outside of the folders, see `CocoImages`.

    Raises:
        ValueError: see `CocoImages`; if a file has objects, but no mask of any; if folders and
            files are not equally many, or list an image twice.
    """

    metrics = ("coverage/all", "cosine", "unrestored")
    lower_is_better: ClassVar[tuple[str, ...]] = ("unrestored",)
    not_judged: ClassVar[tuple[str, ...]] = ("cosine", "unrestored")
    counts: ClassVar[str] = "images"

    def __init__(
        self,
        images: str | Path | Sequence[str | Path],
        annotations: str | Path | Sequence[str | Path],
        processor: Any,
        question: str = "Describe the image.",
        limit: int | None = None,
        outside: bool = False,
    ) -> None:
        images, annotations = _listed(images), _listed(annotations)
        folders = _folders(images, annotations, limit, outside)
        self._images = [(folder, n) for folder in folders for n in range(len(folder))][:limit]
        self._processor = getattr(processor, "image_processor", processor)
        self._settings = {
            "images": images[0] if len(folders) == 1 else images,
            "annotations": annotations[0] if len(folders) == 1 else annotations,
            "question": question,
            "limit": limit,
        }
        self.items = [
            Item(folder.key(n, alone=len(folders) == 1), owner, question, ())
            for owner, (folder, n) in enumerate(self._images)
        ]
        self._on_cells: dict[tuple[int, tuple[int, int]], NDArray[np.bool_]] = {}

    @classmethod
    def from_command(
        cls,
        supplied: Supplied,
        *,
        images: Annotated[Sequence[str], "the folder of the images, or several"],
        instances: Annotated[Sequence[str], "COCO's annotations of them, a file for each folder"],
        num_images: Annotated[int | None, "the first ones (default: all)"] = None,
    ) -> CoverageTask:
        processor = None if supplied.load is None else supplied.load()
        return cls(images, instances, processor, limit=num_images)

    def image(self, owner: int) -> Image.Image:
        folder, number = self._images[owner]
        return folder.image(number)

    def masks(self, owner: int) -> NDArray[np.bool_]:
        """Of every object but crowds, its whole mask, where others lie over it too."""
        width, height = self.image(owner).size
        rows, columns = np.indices((height, width))
        return at_pixels(self._whole_masks(owner), rows, columns, (height, width))

    def _whole_masks(self, owner: int) -> NDArray[np.bool_]:
        folder, number = self._images[owner]
        return folder.masks(number)

    def _areas(self, owner: int) -> NDArray[np.float64]:
        folder, number = self._images[owner]
        return folder.areas(number)

    def describe(self) -> dict[str, Any]:
        return dict(self._settings)

    @torch.no_grad()
    def look(self, host: Host, prompt: Prompt, items: Sequence[Item]) -> list[Record]:
        """Measure what a model kept of a batch.

        Args:
            host: of the model. prompt: with one image a row, as `attach(on_prune=...)` gives it;
                where tokens are dropped inside the language model, after the model has read it.
            items: of the rows.

        Returns:
            see `judge`.

        Raises:
            ValueError: if an image is not one grid of tokens, if the rows are not the items, if the
                processor is not the one that made the inputs, or if the model has not read on.
        """
        if self._processor is None:
            raise ValueError(
                "this coverage task was made without a processor, which says where the pixels of"
                " images went; pass processor=, that of the model."
            )
        return self.judge(kept_of_prompt(host, prompt, len(items), self._processor), items)

    @torch.no_grad()
    def judge(self, kept: KeptTokens, items: Sequence[Item]) -> list[Record]:
        """Measure what is kept of a batch.

        Args:
            kept: an image a row. items: of the rows.

        Returns:
            of every item the objects there are, `coverage/SIZE/of`, and those with a kept token,
            `coverage/SIZE/hits`; `cosine` and `unrestored`.

        Raises:
            ValueError: if the images' pictures are not those that the tower was given.
        """
        cosine = nearest_kept(kept.features, kept.kept).tolist()
        left = unrestored(kept.features, kept.kept).tolist()
        records: list[Record] = []
        for number, (item, own) in enumerate(zip(items, kept.kept.cpu().numpy(), strict=True)):
            on = self._on(kept, item.owner, is_first=number == 0)
            counts = _counts(on, own, self._areas(item.owner))
            means = {"cosine": cosine[number], "unrestored": left[number]}
            records.append({**counts, **means})
        return records

    def ratios(self, records: Sequence[Record]) -> dict[str, Ratio]:
        owners = np.array([item.owner for item in self.items], np.int64)
        records = [current_names(record) for record in records]

        def column(name: str) -> NDArray[np.float64]:
            return np.array([record[name] for record in records], np.float64)

        found = {}
        for name in [f"coverage/{size}" for size in (*SIZES, "all")]:
            found[name] = Ratio(column(f"{name}/hits"), column(f"{name}/of"), owners)
        for name in ("cosine", "unrestored"):
            found[name] = Ratio(column(name), np.ones(len(records)), owners)
        return found

    def _on(self, kept: KeptTokens, owner: int, is_first: bool) -> NDArray[np.bool_]:
        """[O, N] see `cells_on`; the picture's size is checked where it is known."""
        if (owner, kept.grid) not in self._on_cells:
            size = self.image(owner).size
            seen = kept.sight.seen(self._whole_masks(owner), size)
            if is_first and seen.shape[1:] != kept.picture:
                raise ValueError(
                    f"the processor makes a picture of {seen.shape[1:]} pixels of this image, but"
                    f" the model was given one of {kept.picture}; pass the processor that made its"
                    " inputs."
                )
            self._on_cells[owner, kept.grid] = cells_on(seen, kept.grid, kept.sight.patch)
        return self._on_cells[owner, kept.grid]


def _counts(
    on: NDArray[np.bool_], kept: NDArray[np.bool_], areas: NDArray[np.float64]
) -> dict[str, int]:
    """Objects in the picture and those of them with a kept cell, by size."""
    there, covered = on.any(axis=1), (on & kept).any(axis=1)
    counts = {}
    for size, (least, end) in {**SIZES, "all": (0, float("inf"))}.items():
        mine = (areas >= least) & (areas < end)
        counts[f"coverage/{size}/hits"] = int((mine & covered).sum())
        counts[f"coverage/{size}/of"] = int((mine & there).sum())
    return counts


def _listed(paths: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _folders(
    images: Sequence[str], annotations: Sequence[str], limit: int | None, outside: bool
) -> list[_Folder]:
    """Folders with their files.

    Raises:
        ValueError: see `CoverageTask`.
    """
    if len(images) != len(annotations) or not images:
        raise ValueError(
            f"folders of images: {', '.join(images) or 'none'}; annotation files:"
            f" {', '.join(annotations) or 'none'}; pass a file for each folder, in the same order."
        )
    found, known = [], dict[Path, str]()
    for folder, file in zip(images, annotations, strict=True):
        made = _Folder(folder, file, _AsStored(), with_instances=True, limit=limit, outside=outside)
        if made.file.num_objects and not made.file.num_masks:
            raise ValueError(
                f"coverage needs masks, but the objects of {file} have none (`segmentation`), only"
                " boxes; pass a file with masks."
            )
        for path in made.paths:
            if path in known:
                raise ValueError(
                    f"image {path} is listed by {known[path]} and by {file}, and would count twice;"
                    " pass every image once."
                )
        known |= dict.fromkeys(made.paths, file)
        found.append(made)
    return found


class _AsStored:
    """A transform that leaves images as they are, see `ImageTransform`."""

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, h, w] uint8

    def instance_map(self, ids: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(np.array(ids)).long()

    def describe(self) -> dict[str, Any]:
        return {}


class _Folder(CocoImages):
    """Images with their objects' whole masks, those that others lie over included."""

    @property
    def paths(self) -> list[Path]:
        """Where the images are."""
        folder = self.images.resolve()
        return [folder / name for _, name in self._records]

    def key(self, index: int, alone: bool) -> str:
        """Names an image: by its number where the folder is `alone`, else by its path."""
        number, name = self._records[index]
        return str(number) if alone else f"{self.images}/{name}"

    @property
    def file(self) -> CocoFile:
        assert self._coco is not None
        return self._coco

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self[index]["pixel_values"].permute(1, 2, 0).numpy())

    def masks(self, index: int) -> NDArray[np.bool_]:
        """[O, h, w] at the size that the annotation file says."""
        number = self._records[index][0]
        entry = self.file.images[number]
        masks = [self.file.mask(a) for a in self.file.masked(number)]
        return np.array(masks, bool).reshape(-1, entry["height"], entry["width"])

    def areas(self, index: int) -> NDArray[np.float64]:
        """[O] in pixels of the original image."""
        found = [self._area(entry) for entry in self.file.masked(self._records[index][0])]
        return np.array(found, np.float64)

    def _area(self, entry: dict[str, Any]) -> float:
        area = entry.get("area")
        if area is None:
            return float(self.file.mask(entry).sum())
        if isinstance(area, int | float) and 0 <= area < float("inf"):
            return float(area)
        raise ValueError(
            f"an annotation of image {entry['image_id']} has the area {area!r} in {self.file.path};"
            " pass its pixels, or leave it out."
        )
