"""The frozen tower, run once over all images, and its tokens written to files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from ocvtp.data.coco import collate
from ocvtp.data.feature_files import (
    OF_TOKENS,
    Manifest,
    ShardWriter,
    claim,
    describe_shard,
    plain,
    shard_name,
    weights_hash,
)
from ocvtp.data.loader import keep_memory_small
from ocvtp.reporting.progress import progress_bar
from ocvtp.structures import VisualTokens
from ocvtp.training.features import stored_rows
from ocvtp.training.module import PrunerModule

StoredDType = Literal["float16", "bfloat16", "float32"]
Views = Literal["plain", "flip"]
_CROP_SIDE = 0.75
"""Part of an image's sides that a crop has."""


@dataclass(frozen=True)
class ExtractionReport:
    """What an extraction left.

    Args:
        written: shards that this call wrote.
        missing: shards that other ranks have not written yet; with any there is no manifest.
        images: readable images of the finished folder, by split.
        skipped: `FILE: reason` of the others.
        bytes: of all shards.
    """

    written: int
    missing: int
    images: dict[str, int]
    skipped: tuple[str, ...]
    bytes: int


class Extraction:
    """A run of the tower of a training run over its images.

    Building one opens the data, tries one image, and notes in the folder what is extracted; it
    continues what the folder holds of the same settings.

    Args:
        model: its encoder, network and objective say what is read of which tower.
        data: the images: a module with `train_set` and `val_set` after `setup("fit")`, of items as
            `ocvtp.data.coco.CocoImages` has them.
        folder: to write.
        dtype: of hidden states, keys and queries; attention is stored in fp32.
        shard_size: images of a file.
        views: `plain`, or also `flip`: every training image mirrored too.
        rank: which part of the shards is written: number `rank`, `rank + ranks` and so on.
        ranks: how many processes share the work.
        device: where the tower runs.
        crops: so many windows of three quarters of the sides are views of every training image,
            and of the mirrored one, too; they lie elsewhere in each view, and in all images alike.

    Attributes:
        bytes_missing: of the shards that are not there, of all ranks; where images have different
            numbers of tokens, the most that they can have.
        bytes_needed: with what is needed beside them while they are put together.

    Raises:
        ValueError: for data without images, an encoder of tiles with slots of their own, arguments
            out of range, and a folder that was begun with other settings.
    """

    def __init__(
        self,
        model: PrunerModule,
        data: Any,
        folder: str | Path,
        dtype: StoredDType = "float16",
        shard_size: int = 2000,
        views: Views = "plain",
        rank: int = 0,
        ranks: int = 1,
        device: str | torch.device = "cpu",
        crops: int = 0,
    ) -> None:
        _check_arguments(dtype, shard_size, views, crops, rank, ranks)
        _check_sources(model, data)
        self.folder, self._model, self._data = Path(folder), model, data
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._size, self._rank, self._ranks = shard_size, rank, ranks
        self._flips = views == "flip"
        self._windows = [_window(number) for number in range(crops)]
        if (self._flips or crops) and model.encoder.layout != "grid":
            raise ValueError(
                "--views flip and --crops are of images of one grid, and the layout of the encoder"
                f" is {model.encoder.layout!r}; leave them out."
            )
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is not None:
            torch.cuda.set_device(self._device)  # images are decoded there, too
        model.encoder.to(self._device)
        self._sets = _opened(data, self._windows)
        self._samples = {split: _first_readable(images) for split, images in self._sets.items()}
        self.settings = plain(self._settings(dtype))
        claim(self.folder, self.settings)
        most = {split: self._most_bytes(split) for split in self._sets}
        sizes = sorted(most[s] * len(self._range(s, n)) for s, n in self._missing())
        self.bytes_missing = sum(sizes)
        self.bytes_needed = self.bytes_missing + sum(sizes[-ranks:])  # every rank is at one

    def _settings(self, dtype: str) -> dict[str, Any]:
        tower, needs, _ = self._model.reads()
        splits = {
            split: {
                "num_images": len(images),
                "names": _names_hash(images.plain),
                "instances": "instances" in self._samples[split][0],
            }
            for split, images in self._sets.items()
        }
        return {
            "tower": tower,
            "weights": weights_hash(self._model.encoder),
            "needs": asdict(needs),
            "num_heads": self._views("train", self._samples["train"])[0].num_heads,
            "dtype": dtype,
            "views": self._view_names(),
            "shard_size": self._size,
            "splits": splits,
        }

    def _view_names(self) -> list[str]:
        crops = [f"crop {left:.3f} {top:.3f} {_CROP_SIDE}" for left, top in self._windows]
        if not self._flips:
            return ["plain", *crops]
        return ["plain", "flip", *(name for crop in crops for name in (crop, f"flip of {crop}"))]

    # ---------------------------------------------------------------- which shards

    def _shards(self) -> Iterator[tuple[str, int]]:
        for split, images in self._sets.items():
            count = -(-len(images) // self._size)
            yield from ((split, number) for number in range(count))

    def _missing(self) -> list[tuple[str, int]]:
        """Those without a file: it gets its name when it is whole."""
        return [s for s in self._shards() if not (self.folder / shard_name(*s)).is_file()]

    def _own(self) -> list[tuple[str, int]]:
        """The part of this rank, of all that there are."""
        return list(self._shards())[self._rank :: self._ranks]

    def _range(self, split: str, number: int) -> range:
        """The images of a shard."""
        total = len(self._sets[split])
        return range(number * self._size, min((number + 1) * self._size, total))

    def _most_bytes(self, split: str) -> int:
        """What an image takes, or the most that it can."""
        rows = list(self._rows(split, self._samples[split]))
        sizes = {name: values.nbytes for name, values in rows}
        tokens = int(dict(rows)["grids"][0].prod(dim=1).sum())
        of_tokens = sum(n for name, n in sizes.items() if name.split(".")[0] in OF_TOKENS)
        most = of_tokens * self._model.encoder.max_tokens // tokens
        return sum(sizes.values()) - of_tokens + most

    def refuse_full_disk(self) -> None:
        """Find out before hours are spent.

        Raises:
            ValueError: if the disk has less than is needed.
        """
        free = shutil.disk_usage(self.folder).free
        if self.bytes_needed > free:
            raise ValueError(
                f"{self.folder} has {gigabytes(free)} free, and the features need"
                f" {gigabytes(self.bytes_needed)}; make room, pass another --output, or a narrower"
                " --dtype."
            )

    # ---------------------------------------------------------------- the work

    def run(self) -> ExtractionReport:
        """Write the shards of this rank that are missing; the last rank ends with the manifest.

        Raises:
            ValueError: for a full disk, an image that cannot be read (unless the data skips them),
                and values that the dtype cannot hold.
        """
        self.refuse_full_disk()
        missing = set(self._missing())
        own = [shard for shard in self._own() if shard in missing]
        with progress_bar() as bar:
            total = sum(len(self._range(*shard)) for shard in own)
            task = bar.add_task("images", total=total)
            for split, number in own:
                self._write(split, number, lambda count: bar.advance(task, count))
        return self._finish(len(own))

    def _write(self, split: str, number: int, advance: Callable[[int], None]) -> None:
        images: list[tuple[int, str]] = []
        skipped: list[str] = []
        metadata: dict[str, str] = {}
        num_workers = getattr(self._data, "num_workers", 0)
        loader = DataLoader(
            Subset(self._sets[split], self._range(split, number)),
            getattr(self._data, "batch_size", 1),
            collate_fn=_collate,
            num_workers=num_workers,
            prefetch_factor=getattr(self._data, "prefetch_factor", None),
            multiprocessing_context=getattr(self._data, "worker_context", None)
            if num_workers
            else None,
        )
        with ShardWriter(self.folder / shard_name(split, number), metadata) as writer:
            for batches in loader:
                batch = batches[0]  # what is read of the others is the same
                skipped += batch["errors"]
                images += zip(batch["image_ids"], batch["paths"], strict=True)
                if batch["image_ids"]:
                    for name, values in self._rows(split, batches):
                        writer.add(name, values)
                advance(len(batch["image_ids"]) + len(batch["errors"]))
            metadata["images"], metadata["skipped"] = json.dumps(images), json.dumps(skipped)

    def _rows(self, split: str, batches: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        """What is stored of a batch, given as it is seen plain and in every crop."""
        views = self._views(split, batches)
        needs = self._model.encoder.needs
        assert needs is not None
        yield from stored_rows(views, needs, self._model.encoder.resolved(needs), self._dtype)
        mirrored = len(views) // len(batches)
        sizes = [
            torch.tensor(b["image_sizes"], dtype=torch.int32)
            for b in batches
            for _ in range(mirrored)
        ]
        yield "image_sizes", torch.stack(sizes, dim=1).flatten(0, 1)
        if "instances" not in batches[0]:
            return
        seen = [
            view
            for of_image in zip(*(batch["instances"] for batch in batches), strict=True)
            for ids in of_image
            for view in (ids.to(torch.uint8), ids.to(torch.uint8).flip(-1))[:mirrored]
        ]
        yield "instances", torch.cat([ids.flatten() for ids in seen])
        yield "instance_sizes", torch.tensor([ids.shape for ids in seen], dtype=torch.int32)

    @torch.no_grad()
    def _views(self, split: str, batches: list[dict[str, Any]]) -> list[VisualTokens]:
        """The tokens of a batch; of training images, those of the crops and mirrored ones, too."""
        views = []
        for batch in batches:
            batch = move_data_to_device(batch, self._device)
            views.append(self._model.tokens_of(batch))
            if self._flips and split == "train":
                pixels = batch["pixel_values"]
                views.append(self._model.tokens_of({**batch, "pixel_values": pixels.flip(-1)}))
        return views

    def _finish(self, written: int) -> ExtractionReport:
        """Write the manifest where all shards are there; every rank that sees them does."""
        missing = set(self._missing())
        there = [shard for shard in self._shards() if shard not in missing]
        shards: dict[str, list[dict[str, Any]]] = {split: [] for split in self._sets}
        for split, number in there:
            shards[split].append(describe_shard(self.folder / shard_name(split, number)))
        manifest = Manifest(self.folder, self.settings, shards)
        if not missing:
            manifest.write()
        described = [shard for own in shards.values() for shard in own]
        return ExtractionReport(
            written,
            len(missing),
            {split: manifest.num_images(split) for split in self._sets},
            tuple(text for shard in described for text in shard["skipped"]),
            sum(shard["bytes"] for shard in described),
        )


def this_rank() -> tuple[int, int, int]:
    """Rank, number of ranks and rank on this machine, as torchrun or SLURM says; else 0 of 1."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            found = kind()
            return found.global_rank(), found.world_size(), found.local_rank()
    return 0, 1, 0


def gigabytes(count: int) -> str:
    """E.g. `4.7 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _check_arguments(
    dtype: str, shard_size: int, views: str, crops: int, rank: int, ranks: int
) -> None:
    for name, value, kind in (("dtype", dtype, StoredDType), ("views", views, Views)):
        if value not in get_args(kind):
            raise ValueError(f"{name}={value!r}; pass one of {', '.join(get_args(kind))}.")
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}; pass 1 or more images of a file.")
    if crops < 0:
        raise ValueError(f"crops={crops}; pass 0 or more windows of every training image.")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank={rank} of ranks={ranks}; pass a rank from 0 to ranks - 1.")


def _check_sources(model: PrunerModule, data: Any) -> None:
    if getattr(data, "brings_tokens", False):
        raise ValueError(_no_images(data))
    if model.encoder.needs is None:
        raise ValueError("the tower is not loaded; make the module with load_tower=True.")
    if model.encoder.layout == "per_tile":
        raise ValueError(
            "the encoder makes images of tiles (layout 'per_tile'), whose number differs from that"
            " of the photographs; features of these are not stored. Train on the images, or set"
            " slots of the encoder to joint."
        )


class _Seen(Dataset[list[dict[str, Any]]]):
    """Images as they are, and as they are seen in windows.

    Args:
        plain: the images. crops: the same ones, in a window each.
    """

    def __init__(self, plain: Dataset[Any], crops: Sequence[Dataset[Any]] = ()) -> None:
        self.plain, self.crops = plain, crops

    def __len__(self) -> int:
        return len(self.plain)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        found = [images[index] for images in (self.plain, *self.crops)]
        wrong = next((item for item in found if "error" in item), None)
        return found if wrong is None else [wrong] * len(found)


class _Cropped:
    """An image transform that sees a window, see `ocvtp.data.coco.ImageTransform`."""

    def __init__(self, transform: Any, window: tuple[float, float]) -> None:
        self._transform, self._window = transform, window

    def _box(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in an image of this width and height."""
        sides = [max(1, round(_CROP_SIDE * pixels)) for pixels in size]
        left, top = (int(part * n) for part, n in zip(self._window, size, strict=True))
        left, top = min(left, size[0] - sides[0]), min(top, size[1] - sides[1])
        return left, top, left + sides[0], top + sides[1]

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self._transform(image.crop(self._box(image.size)))
        return pixels

    def instance_map(self, ids: NDArray[np.uint8]) -> Tensor:
        left, top, right, bottom = self._box((ids.shape[1], ids.shape[0]))
        mapped: Tensor = self._transform.instance_map(ids[top:bottom, left:right])
        return mapped

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = self._transform.describe()
        return described


def _window(number: int) -> tuple[float, float]:
    """Where a crop's left and upper edges are, in parts of the sides."""
    left, top = np.random.default_rng(number).uniform(0, 1 - _CROP_SIDE, 2).tolist()
    return left, top


def _opened(data: Any, windows: Sequence[tuple[float, float]]) -> dict[str, _Seen]:
    """The training images, and those of the validation where there are any."""
    data.prepare_data()
    transform = getattr(data, "transform", None)
    if windows and transform is None:
        raise ValueError(
            f"crops are cut before the transform of {type(data).__name__}, and it has none; set it,"
            " or pass no crops."
        )
    crops = []
    for window in windows:
        data.transform = _Cropped(transform, window)
        data.setup("fit")
        crops.append(data.train_set)
    data.transform = transform
    data.setup("fit")
    if getattr(data, "train_set", None) is None:
        raise ValueError(_no_images(data))
    found = {"train": _Seen(data.train_set, crops)}
    validation = getattr(data, "val_set", None) if getattr(data, "has_validation", True) else None
    if validation:
        found["validation"] = _Seen(validation)
    return found


def _collate(items: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A batch of the images as they are, and one of every crop."""
    keep_memory_small()
    return [collate(view) for view in zip(*items, strict=True)]


def _no_images(data: Any) -> str:
    return (
        f"data is {type(data).__name__}, which has no images (train_set) to run the tower on; pass"
        " one that has, e.g. ocvtp.data.folder.FolderDataModule."
    )


def _first_readable(images: _Seen) -> list[dict[str, Any]]:
    """A batch of one image."""
    for number in range(len(images)):
        views = images[number]
        if "error" not in views[0]:
            return _collate([views])
    raise ValueError("none of the images can be read; pass a folder of others.")


def _names_hash(images: Dataset[Any]) -> str:
    """sha256 of which images they are, in their order."""
    return hashlib.sha256(json.dumps(_names(images)).encode()).hexdigest()


def _names(images: Any) -> list[Any]:
    """Of data that does not name its images, none: then their number alone is compared."""
    if isinstance(images, ConcatDataset):
        return [name for part in images.datasets for name in _names(part)]
    if isinstance(images, Subset):
        names = _names(images.dataset)
        return [names[i] for i in images.indices] if names else []
    return list(getattr(images, "names", ()))
