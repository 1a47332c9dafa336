"""The LightningDataModules, and a loader whose order is one stream that a checkpoint can continue.

Batch k of a run depends on the seed and on k alone: not on how often the run was stopped, nor on
how Lightning counts the epoch in which it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ocvtp.data.coco import CocoImages, ImageTransform, collate
from ocvtp.data.scenes import write_scenes


class StreamSampler(DistributedSampler[int]):
    """This process's share of each epoch's order, which depends on seed and epoch alone.

    A DistributedSampler, so that Lightning leaves it in place. Where the processes do not divide
    the images, the last ones of an order are left out of its epoch.

    Args:
        dataset: with a length.
        seed: of the orders, not negative.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        num_replicas = distributed.get_world_size() if together else 1
        rank = distributed.get_rank() if together else 0
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)
        self.num_images = len(dataset)  # type: ignore[arg-type]
        self._next = (0, 0)

    def seek(self, epoch: int, first: int) -> None:
        """The next pass is over `epoch`, without the first `first` images of this process."""
        self._next = (epoch, first)

    def __iter__(self) -> Iterator[int]:
        epoch, first = self._next
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
        share = order[: self.total_size][self.rank :: self.num_replicas]
        return iter(share[first:].tolist())


class ResumableLoader(DataLoader[Any]):
    """A loader over an endless stream of shuffled epochs that knows how far it was read.

    A pass yields `len(loader)` batches from where the last one ended; the first pass after
    `load_state_dict` ends with the epoch that was interrupted. A loader that was never read and got
    no state starts with the epoch that `sampler.set_epoch` named, as Lightning does.

    Args:
        dataset: with a length.
        batch_size: per process; what is left over at the end of an epoch is dropped.
        seed: of the orders, not negative.
        options: of `torch.utils.data.DataLoader`.

    Raises:
        ValueError: if there is not one whole batch.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, seed: int = 0, **options: Any
    ) -> None:
        self.stream = StreamSampler(dataset, seed)
        if not 1 <= batch_size <= len(self.stream):
            raise ValueError(
                f"batch_size={batch_size} does not fit the {len(self.stream)} training images of a "
                "process; pass more images, or a batch_size from 1 to their number."
            )
        options.setdefault("sampler", self.stream)
        options.setdefault("generator", _own_generator(seed))
        super().__init__(dataset, batch_size, **{"drop_last": True, **options})
        self._batches: int | None = None
        self._loaded = False

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, and what that number depends on."""
        epoch, batch = divmod(self._batches or 0, len(self))
        return {"epoch": epoch, "batch": batch, **self._layout()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where the loader of `state_dict` stood.

        Raises:
            ValueError: if that was inside an epoch that other settings made.
        """
        layout = self._layout()
        saved = {name: state[name] for name in layout}
        if state["batch"] and saved != layout:
            raise ValueError(
                f"the checkpoint was written inside an epoch with {saved}, but now there is "
                f"{layout}, so the batches that were left do not exist; resume with the same data "
                "settings, or from a checkpoint written at the end of an epoch."
            )
        self._batches = state["epoch"] * len(self) + state["batch"]
        self._loaded = True

    def _layout(self) -> dict[str, int]:
        return {
            "num_images": self.stream.num_images,
            "batch_size": self.batch_size or 0,
            "num_processes": self.stream.num_replicas,
            "seed": self.stream.seed,
        }

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """One pass; reads nothing before the first batch, as Lightning names the epoch late."""
        if self._batches is None:
            self._batches = self.stream.epoch * len(self)
        left = len(self) - (self._batches % len(self) if self._loaded else 0)
        self._loaded = False
        while left:
            epoch, batch = divmod(self._batches, len(self))
            self.stream.seek(epoch, batch * (self.batch_size or 0))
            for item in super().__iter__():
                self._batches += 1
                left -= 1
                yield item
                if not left:
                    break


def _own_generator(seed: int) -> torch.Generator:
    """Seeds workers without a draw from the global generator, which belongs to the model."""
    return torch.Generator().manual_seed(seed)


class CocoDataModule(pl.LightningDataModule):
    """COCO, or any folders of images, for training and validation.

    Args:
        root: folder that the paths below are relative to.
        train_images: folder of the training images.
        train_annotations: instances file that lists them; None for every image of the folder.
        val_images: folder of the validation images; None for no validation.
        val_annotations: instances file; with it, validation batches have `instances`.
        batch_size: of training, per process.
        val_batch_size: of validation; None for `batch_size`.
        num_workers: processes that load; 0 loads in the training process.
        on_error: `raise` on an unreadable image, or `skip` it and name it in `errors`.
        limit_train: use only the first so many training images.
        limit_val: the same for validation.
        seed: of the training order, not negative.
        transform: the host's image processing; may be set later, as the attribute of that name.
    """

    def __init__(
        self,
        root: str,
        train_images: str = "train2017",
        train_annotations: str | None = "annotations/instances_train2017.json",
        val_images: str | None = "val2017",
        val_annotations: str | None = "annotations/instances_val2017.json",
        batch_size: int = 12,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        limit_train: int | None = None,
        limit_val: int | None = None,
        seed: int = 0,
        transform: ImageTransform | None = None,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.train_paths = (train_images, train_annotations)
        self.val_paths = (val_images, val_annotations)
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers = num_workers
        self.on_error = on_error
        self.limit_train, self.limit_val = limit_train, limit_val
        self.seed = seed
        self.transform = transform
        self.train_set: CocoImages | None = None
        self.val_set: CocoImages | None = None
        self._loader: ResumableLoader | None = None
        self._state: dict[str, int] = {}

    @property
    def has_validation(self) -> bool:
        """Whether there are validation images."""
        return self.val_paths[0] is not None

    def setup(self, stage: str | None = None) -> None:
        """Open the images: for `fit` both sets, for `validate` one; None for both.

        Raises:
            ValueError: if there is no transform, or if images or annotations are missing.
        """
        if stage in (None, "fit"):
            self._loader, self._state = None, {}
            self.train_set = self._open(*self.train_paths, self.limit_train, instances=False)
        if stage in (None, "fit", "validate") and self.has_validation:
            self.val_set = self._open(*self.val_paths, self.limit_val, instances=True)

    def _open(
        self, images: str | None, annotations: str | None, limit: int | None, instances: bool
    ) -> CocoImages:
        if self.transform is None:
            raise ValueError(
                f"{type(self).__name__} has no transform; set `.transform` to the image transform "
                "of the encoder before the Trainer runs."
            )
        return CocoImages(
            self.root / (images or ""),
            None if annotations is None else self.root / annotations,
            self.transform,
            on_error=self.on_error,
            with_instances=instances and annotations is not None,
            limit=limit,
        )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled whole batches, from where the checkpoint or the last loader stood."""
        state = self.state_dict()
        options = {**self._options(), "persistent_workers": self.num_workers > 0}
        train_set = _opened(self.train_set)
        self._loader = ResumableLoader(train_set, self.batch_size, self.seed, **options)
        if state:
            self._loader.load_state_dict(state)
        return self._loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches in the order of the images; none without validation images."""
        if not self.has_validation:
            return []
        generator = _own_generator(self.seed)
        options = {**self._options(), "generator": generator}
        return DataLoader(_opened(self.val_set), self.val_batch_size, **options)

    def _options(self) -> dict[str, Any]:
        return {
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }

    def state_dict(self) -> dict[str, int]:
        """The state of the training loader.

        Lightning keeps it too, but restores it only where it counts an epoch as unfinished.
        """
        return self._state if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """What the next training loader starts from."""
        self._loader, self._state = None, state


def _opened(dataset: CocoImages | None) -> CocoImages:
    if dataset is None:
        raise ValueError("the data is not open yet; call setup() first, or let the Trainer do it.")
    return dataset


class SceneDataModule(CocoDataModule):
    """Drawn scenes, made on first use.

    Args:
        root: folder that they are written to.
        num_train: training scenes.
        num_val: validation scenes.
        image_size: pixels of an edge.
        scene_seed: of the drawing.
        options: of `CocoDataModule`.
    """

    def __init__(
        self,
        root: str = "outputs/scenes",
        num_train: int = 2000,
        num_val: int = 200,
        image_size: int = 96,
        scene_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        self._scenes = (num_train, num_val, image_size, scene_seed)

    def prepare_data(self) -> None:
        """Draw the scenes that are not there yet."""
        write_scenes(self.root, *self._scenes)
