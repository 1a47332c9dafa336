"""Training on features that `ocvtp extract` wrote: images, order and the LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ocvtp.data.coco import ImageTransform, collate, stacked
from ocvtp.data.feature_files import (
    OF_IMAGES,
    OF_TOKENS,
    Manifest,
    differences,
    ends,
    plain,
    tensor_key,
    tensor_name,
)
from ocvtp.data.loader import ShardSampler, StreamSampler
from ocvtp.data.module import ResumableDataModule
from ocvtp.structures import Needs

_LARGEST = 2**16
"""Pixels and tokens of an edge, of which no product goes beyond 64 bits."""


class FeatureImages(Dataset[dict[str, Any]]):
    """The images of a split, as their features.

    An item is a dict of `hidden`, `attention`, `keys` (of tokens), `cls_keys`, `cls_queries` and
    `cls` (of the image), dicts as those of `VisualTokens`, `cls` by its layer; `grids` [V, 2],
    `image_size`, `image_id`, `path` and, where there are masks, `instances`, as in
    `ocvtp.data.coco.CocoImages`. Tensors are slices of the memory-mapped file, in its dtype.

    Args:
        manifest: of the folder.
        split: `train` or `validation`.

    Attributes:
        num_views: of every image. Index `(i, v)` is view v of image i, and `i` is `(i, 0)`.
        starts: [shards + 1] number of the first image of every shard, and of all.

    Raises:
        ValueError: by items, for a shard that does not hold what the manifest says.
    """

    def __init__(self, manifest: Manifest, split: Literal["train", "validation"]) -> None:
        self._folder = manifest.folder
        has_masks = manifest.settings["splits"].get(split, {}).get("instances", False)
        self._wanted = _wanted(manifest.settings["needs"]) | ({"instances"} if has_masks else set())
        self._shards = manifest.shards[split]
        self.starts = ends([len(shard["images"]) for shard in self._shards]).numpy()
        self.num_views = len(manifest.settings["views"]) if split == "train" else 1
        self._opened: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:  # every process maps the files itself
        return {**self.__dict__, "_opened": {}}

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        image, view = index if isinstance(index, tuple) else (index, 0)
        if not 0 <= image < len(self) or not 0 <= view < self.num_views:
            raise IndexError(f"there is no view {view} of image {image}")
        number = int(np.searchsorted(self.starts, image, side="right")) - 1
        place = image - int(self.starts[number])
        if number not in self._opened:
            self._opened[number] = self._open(number)
        item = self._opened[number].row(place * self.num_views + view)
        image_id, path = self._shards[number]["images"][place]
        return {**item, "image_id": image_id, "path": path}

    def _open(self, number: int) -> _Shard:
        path = self._folder / self._shards[number]["file"]
        rows = len(self._shards[number]["images"]) * self.num_views
        try:
            shard = _Shard(path, rows)
            if absent := sorted(self._wanted - shard.widths.keys()):
                raise ValueError(f"{', '.join(absent)} is not there")
            if self._opened and shard.widths != next(iter(self._opened.values())).widths:
                raise ValueError("its tensors are of other widths than those of another shard")
        except Exception as error:  # the reader has errors of its own
            raise ValueError(
                f"{path} is no whole shard of features ({error}); delete it and extract again."
            ) from error
        return shard


class _Shard:
    """A memory-mapped file of features, of so many rows.

    Attributes:
        widths: shapes of what is stored of a token or an image, by the names of tensors.
    """

    def __init__(self, path: Path, rows: int) -> None:
        file: Any = safe_open(path, "pt")
        names = list(file.keys())
        self._grids = _sizes(file, "grids", rows, -1, 2).clone()
        self._sizes = _sizes(file, "image_sizes", rows, 2).tolist()
        self._tokens = ends(self._grids.prod(dim=2).sum(dim=1)).tolist()
        self._areas: list[int] | None = None
        self._slices = {n: file.get_slice(n) for n in names}
        shapes = {n: tuple(values.get_shape()) for n, values in self._slices.items()}
        if "instances" in names:
            self._shapes = _sizes(file, "instance_sizes", rows, 2).tolist()
            self._areas = ends([height * width for height, width in self._shapes]).tolist()
            _expect("instances", shapes["instances"], (self._areas[-1],))
        kinds = (*OF_TOKENS, *OF_IMAGES)
        self._named = {n: tensor_key(n) for n in names if n.split(".")[0] in kinds}
        for name, (kind, _) in self._named.items():
            count = self._tokens[-1] if kind in OF_TOKENS else rows
            _expect(name, shapes[name], (count,) if kind == "attention" else (count, -1))
        self.widths = {n: shapes[n][1:] for n in names if n in self._named or n == "instances"}

    def row(self, row: int) -> dict[str, Any]:
        """All that is stored of one view of an image."""
        item: dict[str, Any] = {kind: {} for kind in (*OF_TOKENS, *OF_IMAGES)}
        for name, (kind, key) in self._named.items():
            values = self._slices[name]
            if kind in OF_TOKENS:
                item[kind][key] = values[self._tokens[row] : self._tokens[row + 1]]
            else:
                item[kind][key] = values[row : row + 1][0]
        item["grids"], item["image_size"] = self._grids[row], tuple(self._sizes[row])
        if self._areas is not None:
            ids = self._slices["instances"][self._areas[row] : self._areas[row + 1]]
            item["instances"] = ids.view(*self._shapes[row]).long()
        return item


def _wanted(needs: Mapping[str, Any]) -> set[str]:
    """Tensors that every shard has."""
    kinds = {kind: needs.get(kind) or () for kind in OF_TOKENS}
    kinds |= {"cls_queries": needs.get("cls_queries") or ()}
    kinds |= {"cls": needs["hidden"][:1] if needs.get("cls") else ()}
    return {
        tensor_name(kind, tuple(key) if isinstance(key, list) else key)
        for kind, keys in kinds.items()
        for key in keys
    }


def _sizes(file: Any, name: str, *shape: int) -> Tensor:
    """Heights and widths [R, 2], or [R, V, 2] of V views; any number where a size is -1."""
    sizes: Tensor = file.get_tensor(name)
    _expect(name, sizes.shape, shape)
    if sizes.is_floating_point() or not bool(((sizes >= 0) & (sizes < _LARGEST)).all()):
        raise ValueError(f"{name} are no heights and widths")
    return sizes


def _expect(name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    alike = len(shape) == len(wanted) and all(
        size in (own, -1) for own, size in zip(shape, wanted, strict=True)
    )
    if not alike:
        raise ValueError(f"{name} has shape {list(shape)}, not {list(wanted)}")


def put_together(items: list[dict[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of items of `FeatureImages`.

    Args:
        items: B of them.
        settings: of the manifest.

    Returns:
        what `ocvtp.data.coco.collate` returns, but in the place of `pixel_values` `tokens`: a dict
        of the fields of `VisualTokens` without `features`, as the encoder makes them of these
        images, in the dtype of the files; `cls` is a dict by its layer. `file_names` are the whole
        paths, and `errors` is empty.
    """
    tower = settings["tower"]
    grids = torch.stack([item["grids"] for item in items])  # [B, V, 2]
    grid_hw = tuple(tower["grid_hw"])
    is_packed = tower["layout"] == "joint"
    if tower["layout"] == "variable" and bool((grids == grids[0]).all()):
        grid_hw = tuple(grids[0, 0].tolist())
    elif tower["layout"] == "variable":
        is_packed = True
    elif tower["layout"] == "grid" and not bool((grids == torch.tensor(grid_hw)).all()):
        raise ValueError(f"features are of grids {grids.tolist()}, and their tower has {grid_hw}")
    tokens: dict[str, Any] = {"grid_hw": grid_hw, "num_heads": settings["num_heads"]}
    for kind in OF_TOKENS:
        tokens[kind] = {k: _padded(_all(items, kind, k)) for k in items[0][kind]}
    for kind in OF_IMAGES:
        tokens[kind] = {k: torch.stack(_all(items, kind, k)) for k in items[0][kind]}
    if is_packed:
        counts = grids.prod(dim=2).sum(dim=1)
        tokens["valid"] = torch.arange(int(counts.max())) < counts[:, None]
        tokens["grids"] = grids.long()
    batch = {
        "tokens": tokens,
        "image_sizes": [item["image_size"] for item in items],
        "image_ids": [item["image_id"] for item in items],
        "file_names": [item["path"] for item in items],
        "paths": [item["path"] for item in items],
        "errors": [],
    }
    if "instances" in items[0]:
        batch["instances"] = stacked([item["instances"] for item in items])
    return batch


def _padded(rows: list[Tensor]) -> Tensor:
    """[B, N, ...], 0 after the end of those that are shorter."""
    alike = len({len(row) for row in rows}) == 1
    return torch.stack(rows) if alike else pad_sequence(rows, batch_first=True)


def _all(items: list[dict[str, Any]], kind: str, key: Any) -> list[Tensor]:
    return [item[kind][key] for item in items]


class FeatureSampler(ShardSampler):
    """An order that reads few shards at a time, and a view of every image.

    Args:
        dataset: the images.
        seed: of orders and views.
        mixed_shards: see `ShardSampler`.
    """

    def __init__(self, dataset: FeatureImages, seed: int, mixed_shards: int) -> None:
        super().__init__(dataset, dataset.starts, seed, mixed_shards)
        self._num_views = dataset.num_views

    def layout(self) -> dict[str, int]:
        return {**super().layout(), "num_views": self._num_views}

    def __iter__(self) -> Iterator[Any]:
        epoch = self._next[0]
        if self._num_views == 1:
            return super().__iter__()
        draws = np.random.default_rng([self.seed, epoch, 1])
        views = draws.integers(self._num_views, size=self.num_images).tolist()
        return ((image, views[image]) for image in super().__iter__())


class FeatureDataModule(ResumableDataModule):
    """Features that `ocvtp extract` wrote, in the place of images: the tower does not run.

    Args:
        root: folder that was written.
        batch_size: of training, per process.
        val_batch_size: of validation; None for `batch_size`.
        num_workers: processes that load; the files are mapped into memory, so 0 is fast.
        mixed_shards: of so many shards at a time images are shuffled among each other, see
            `FeatureSampler`; more of them read the disk in more places.
        seed: of the training order, not negative.
        transform: the host's image processing, which must be that of the features.
        verify: whether all files are read before anything else, and compared with their hashes.
        loading: see `ocvtp.data.module.ResumableDataModule`.

    Raises:
        ValueError: for less than one of `mixed_shards`.
    """

    brings_tokens = True
    """Batches have `tokens`: the module that is trained need not read its tower."""

    def __init__(
        self,
        root: str,
        batch_size: int = 12,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        mixed_shards: int = 8,
        seed: int = 0,
        transform: ImageTransform | None = None,
        verify: bool = False,
        **loading: Any,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, seed, transform, **loading)
        if mixed_shards < 1:
            raise ValueError(f"mixed_shards={mixed_shards}; pass 1 or more.")
        self.root = Path(root)
        self.mixed_shards = mixed_shards
        self.verify = verify

    def prepare_data(self) -> None:
        """Verify the files where that is asked for.

        Raises:
            ValueError: see `ocvtp.data.feature_files.verify_shard`.
        """
        if self.verify:
            self.manifest.verify()

    @cached_property
    def manifest(self) -> Manifest:
        """Of the folder.

        Raises:
            ValueError: see `Manifest.read`.
        """
        return Manifest.read(self.root)

    @property
    def has_validation(self) -> bool:
        return self.manifest.num_images("validation") > 0

    def setup(self, stage: str | None = None) -> None:
        """Open the files.

        Raises:
            ValueError: if they are not whole, or are not what the module that is trained reads.
        """
        reads = getattr(getattr(self.trainer, "lightning_module", None), "reads", None)
        if reads is not None:
            self.check(*reads())
        if stage in (None, "fit"):
            self._loader, self._state = None, {}
            self.train_set = FeatureImages(self.manifest, "train")
        if stage in (None, "fit", "validate") and self.has_validation:
            self.val_set = FeatureImages(self.manifest, "validation")

    def check(self, tower: dict[str, Any], needs: Needs, objects: bool) -> None:
        """Compare the files with what will be read of them.

        Args:
            tower: what the encoder is, see `FrozenEncoder.origin`.
            needs: what is read of it, with the numbers of its layers and blocks not negative.
            objects: whether training reads masks of objects.

        Raises:
            ValueError: names all that differs.
        """
        settings = self.manifest.settings
        there, here = settings["tower"], plain(tower)
        if there["id"] != here["id"]:  # all else follows from that
            there, here = {"id": there["id"]}, {"id": here["id"]}
        wrong = list(differences("tower", there, here))
        wrong += _absent(needs, settings["needs"])
        if objects and not settings["splits"]["train"]["instances"]:
            wrong.append("masks of objects are not there, as train_instances of the data was false")
        if wrong:
            raise ValueError(
                f"the features in {self.root} are not those that this training reads:"
                f" {'; '.join(wrong)}. Pass the settings that they were extracted with (its"
                " extraction.json has them), or extract again into another folder."
            )

    def _stream(self, train_set: Dataset[Any]) -> StreamSampler:
        assert isinstance(train_set, FeatureImages)
        return FeatureSampler(train_set, self.seed, self.mixed_shards)

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return put_together(items, self.manifest.settings) if items else collate(items)


def _absent(needs: Needs, there: Mapping[str, Any]) -> Iterator[str]:
    """What is asked for and was not extracted."""
    for field in fields(Needs):
        asked, found = plain(getattr(needs, field.name)), there.get(field.name, [])
        if isinstance(asked, list):
            name = {"hidden": "hidden_states"}.get(field.name, field.name)
            told = ", ".join(map(_numbers, found)) or "none"
            missing = [one for one in asked if one not in found]
            yield from (f"{name}[{_numbers(one)}] is not there (but {told})" for one in missing)
        elif field.name != "patch_queries" and asked and not found:
            yield f"{field.name} is not there"
    if needs.cls and there["cls"] and there["hidden"][0] != needs.hidden[0]:
        yield f"cls is of hidden_states[{there['hidden'][0]}] there and [{needs.hidden[0]}] here"
    if needs.reads_received and needs.patch_queries != there["patch_queries"]:
        yield "the attention received is not the mean over the same queries (patch_queries)"


def _numbers(key: Any) -> str:
    return ", ".join(map(str, key)) if isinstance(key, list) else str(key)
