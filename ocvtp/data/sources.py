"""The LightningDataModules of images in tar files and in tables."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset, Subset

from ocvtp.data.coco import ImageTransform
from ocvtp.data.folder import HeldOut
from ocvtp.data.image_sources import SourceImages, TableImages, TarImages, tar_files
from ocvtp.data.loader import ShardSampler, StreamSampler, ends
from ocvtp.data.module import ResumableDataModule


class SourceDataModule(ResumableDataModule):
    """Images of a source, without annotations.

    Args:
        root: where the training images are.
        val_root: where those of the validation are; None for none.
        num_val: so many images of `root` are held out for the validation instead.
        split_seed: of which ones; apart from `seed`, so that runs of several seeds share them.
        batch_size: of training, per process.
        val_batch_size: of validation; None for `batch_size`.
        num_workers: processes that load; 0 loads in the training process.
        on_error: `raise` on an unreadable image, or `skip` it and name it in `errors`.
        limit_train: use only the first so many training images.
        limit_val: the same for validation.
        mixed_shards: of so many files at a time images are shuffled among each other, see
            `ocvtp.data.loader.ShardSampler`.
        seed: of the training order, not negative.
        transform: the host's image processing; may be set later, as the attribute of that name.
        loading: see `ResumableDataModule`.

    Raises:
        ValueError: for `num_val` and `val_root` at once, or a number out of range.
    """

    def __init__(
        self,
        root: str,
        val_root: str | None = None,
        num_val: int = 0,
        split_seed: int = 0,
        batch_size: int = 12,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        limit_train: int | None = None,
        limit_val: int | None = None,
        mixed_shards: int = 8,
        seed: int = 0,
        transform: ImageTransform | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, seed, transform, **loading)
        for name, number, least in (
            ("mixed_shards", mixed_shards, 1),
            ("limit_train", 1 if limit_train is None else limit_train, 1),
            ("limit_val", 1 if limit_val is None else limit_val, 1),
        ):
            if number < least:
                raise ValueError(f"{name}={number}; pass {least} or more.")
        self._held_out = HeldOut(num_val, split_seed, root, val_root)
        self.root, self.val_root = root, val_root
        self.on_error: Literal["raise", "skip"] = on_error
        self.mixed_shards = mixed_shards
        self._limits = (limit_train, limit_val)

    @property
    def has_validation(self) -> bool:
        return self.val_root is not None or bool(self._held_out)

    @abstractmethod
    def images(self, root: str, split: Literal["train", "val"]) -> SourceImages:
        """Those of a place.

        Raises:
            ValueError: if they cannot be read.
        """

    def setup(self, stage: str | None = None) -> None:
        """Open the images: for `fit` both sets, for `validate` one; None for both.

        Raises:
            ValueError: if there is no transform, no image, too few to hold out, or a file of both
                sets.
        """
        self._need_transform()
        fits, validates = stage in (None, "fit"), stage in (None, "fit", "validate")
        if fits:
            self._loader, self._state = None, {}
        if self._held_out:
            images = self.images(self.root, "train")
            train, val = self._held_out.parts(len(images))
            if fits:
                self.train_set = _part(images, train[: self._limits[0]])
            if validates:
                self.val_set = _part(images, val[: self._limits[1]])
            return
        if fits:
            images = self.images(self.root, "train")
            self.train_set = _part(images, np.arange(len(images))[: self._limits[0]])
        if validates and self.val_root is not None:
            images = self.images(self.val_root, "val")
            if fits:
                self._refuse_shared(images)
            self.val_set = _part(images, np.arange(len(images))[: self._limits[1]])

    def _refuse_shared(self, val: SourceImages) -> None:
        assert isinstance(self.train_set, Subset)
        train: Any = self.train_set.dataset
        if shared := sorted(train.files & val.files):
            raise ValueError(
                f"{len(shared)} of the {len(val.files)} files of the validation are trained on,"
                f" {shared[0]} first; pass others, or num_val."
            )

    def _stream(self, train_set: Dataset[Any]) -> StreamSampler:
        assert isinstance(train_set, Subset)
        images: Any = train_set.dataset
        shards = np.searchsorted(images.starts, train_set.indices, side="right") - 1
        counts = np.bincount(shards, minlength=len(images.starts) - 1)
        return ShardSampler(train_set, ends(counts[counts > 0]), self.seed, self.mixed_shards)


def _part(images: SourceImages, indices: np.ndarray[Any, np.dtype[np.int64]]) -> Subset[Any]:
    """Some of them, ascending."""
    return Subset(images, indices)  # type: ignore[arg-type]  # an array has no object an index


class TarDataModule(SourceDataModule):
    """Images in tar files, as webdataset has them.

    The library is not needed: images are read where they lie in local files, so that orders are
    exact, resume in the middle of an epoch, and are shared by processes without one twice.

    Args:
        root: folder of .tar files, or a pattern, `shards/{000..119}.tar`.
        options: of `SourceDataModule`.
    """

    def __init__(self, root: str, **options: Any) -> None:
        super().__init__(root, **options)

    def images(self, root: str, split: Literal["train", "val"]) -> TarImages:
        assert self.transform is not None
        return TarImages(tar_files(root), self.transform, self.on_error)


class TableDataModule(SourceDataModule):
    """Images in a table of Hugging Face's `datasets`: parquet files, or what `save_to_disk` wrote.

    Needs the library (`pip install -e '.[datasets]'` in a clone); nothing is downloaded.

    Args:
        root: folder or .parquet file, see `ocvtp.data.image_sources.TableImages`.
        column: with the images.
        train_split: of the training images. val_split: of the validation, which is in `root` too
            where there is no `val_root`; None for none.
        outside: see `ocvtp.data.image_sources.TableImages`.
        options: of `SourceDataModule`.
    """

    def __init__(
        self,
        root: str,
        column: str = "image",
        train_split: str = "train",
        val_split: str | None = None,
        outside: bool = False,
        **options: Any,
    ) -> None:
        if val_split is not None and options.get("val_root") is None:
            options["val_root"] = root
        super().__init__(root, **options)
        self.column, self.outside = column, outside
        self._names = {"train": train_split, "val": val_split or train_split}

    def images(self, root: str, split: Literal["train", "val"]) -> TableImages:
        assert self.transform is not None
        name = self._names[split]
        return TableImages(
            Path(root), self.transform, name, self.column, self.on_error, self.outside
        )
