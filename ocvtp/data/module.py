"""The LightningDataModules of images in folders, of drawn scenes, and of questions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from multiprocessing import get_all_start_methods, get_start_method
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ocvtp.choices import Level, Split
from ocvtp.data.coco import CocoImages, Decoder, ImageTransform, collate, decoding_device
from ocvtp.data.loader import (
    GroupedSampler,
    InOrder,
    ResumableLoader,
    StreamSampler,
    keep_memory_small,
    own_generator,
)
from ocvtp.data.question_sets import QuestionSet, QuestionTransform
from ocvtp.data.scene_questions import scene_questions
from ocvtp.data.scenes import write_scenes
from ocvtp.images import limit_pixels, most_pixels


class ResumableDataModule(pl.LightningDataModule, ABC):
    """Training in an order that a checkpoint can continue, and validation in the given one.

    Args:
        batch_size: of training, per process.
        val_batch_size: of validation; None for `batch_size`.
        num_workers: processes that load; 0 loads in the training process.
        seed: of the training order, not negative.
        transform: the host's processing; may be set later, as the attribute of that name.
        persistent_workers: whether the processes that load training data live from one epoch to
            the next.
        pin_memory: whether batches are put where a GPU copies them from; None: where there is one.
        prefetch_factor: batches that each of these processes loads ahead; None for two.

    Attributes:
        train_set: open after `setup`. val_set: the same.
        whole_epochs: whether the images that do not fill the last batch of an epoch are a smaller
            one; else they are left out, other ones in every epoch.

    Raises:
        ValueError: if a number is out of range, or nothing loads ahead.
    """

    whole_epochs = False
    transform_kind: ClassVar[str] = "the image transform of the encoder"
    """What `transform` is to be, for the message where it is missing."""

    def __init__(
        self,
        batch_size: int,
        val_batch_size: int | None,
        num_workers: int,
        seed: int,
        transform: Any,
        persistent_workers: bool = True,
        pin_memory: bool | None = None,
        prefetch_factor: int | None = None,
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}; pass 0 or more.")
        if prefetch_factor is not None and (prefetch_factor < 1 or not num_workers):
            raise ValueError(
                f"prefetch_factor={prefetch_factor} and num_workers={num_workers}; pass 1 or more"
                " batches that each of 1 or more workers loads ahead, or leave prefetch_factor out."
            )
        self.persistent_workers, self.pin_memory = persistent_workers, pin_memory
        self.prefetch_factor = prefetch_factor
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.transform = transform
        self.train_set: Dataset[Any] | None = None
        self.val_set: Dataset[Any] | None = None
        self._loader: ResumableLoader | None = None
        self._state: dict[str, int] = {}

    @property
    @abstractmethod
    def has_validation(self) -> bool:
        """Whether there are validation images."""

    def _need_transform(self) -> None:
        if self.transform is None:
            raise ValueError(
                f"{type(self).__name__} has no transform; set `.transform` to {self.transform_kind}"
                " before the Trainer runs."
            )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled whole batches, from where the checkpoint or the last loader stood."""
        state = self.state_dict()
        options = self._options()
        options["persistent_workers"] = self.persistent_workers and self.num_workers > 0
        train_set = _opened(self.train_set)
        stream = self._stream(train_set)
        self._loader = ResumableLoader(
            train_set, self.batch_size, self.seed, stream, self.whole_epochs, **options
        )
        if state:
            self._loader.load_state_dict(state)
        return self._loader

    def _stream(self, train_set: Dataset[Any]) -> StreamSampler:
        """The order of the training images."""
        return StreamSampler(train_set, self.seed)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches in the order of the images, each in one process; none without images."""
        if not self.has_validation:
            return []
        val_set = _opened(self.val_set)
        options = {**self._options(), "generator": own_generator(self.seed)}
        return DataLoader(val_set, self.val_batch_size, sampler=InOrder(val_set), **options)

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(items)

    def _batch(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        keep_memory_small()
        return self._collate(items)

    def _options(self) -> dict[str, Any]:
        return {
            "collate_fn": self._batch,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            "prefetch_factor": self.prefetch_factor,
            "multiprocessing_context": self.worker_context if self.num_workers else None,
            "worker_init_fn": self._worker_start,
        }

    @property
    def _worker_start(self) -> Any:
        """Tells a process that is not forked what this one knows; None for forked ones."""
        usual = get_start_method(allow_none=True) or get_all_start_methods()[0]
        if not self.num_workers or (self.worker_context or usual) == "fork":
            return None
        return partial(_start, most_pixels())

    @property
    def worker_context(self) -> str | None:
        """How processes that load are started; a forked one cannot use a GPU."""
        return None

    def state_dict(self) -> dict[str, int]:
        """The state of the training loader.

        Lightning keeps it too, but restores it only where it counts an epoch as unfinished.
        """
        return self._state if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """What the next training loader starts from."""
        self._loader, self._state = None, state


def _start(most: int, worker: int) -> None:
    del worker
    limit_pixels(most)


def _opened(dataset: Dataset[Any] | None) -> Dataset[Any]:
    if dataset is None:
        raise ValueError("the data is not open yet; call setup() first, or let the Trainer do it.")
    return dataset


class CocoDataModule(ResumableDataModule):
    """COCO, or any folders of images, for training and validation.

    Args:
        root: folder that the paths below are relative to.
        train_images: folder of the training images.
        train_annotations: instances file that lists them; None for every image of the folder.
        val_images: folder of the validation images; None for no validation.
        val_annotations: instances file; with it, validation batches have `instances`, unless it
            has boxes alone.
        batch_size: of training, per process.
        val_batch_size: of validation; None for `batch_size`.
        num_workers: processes that load; 0 loads in the training process.
        on_error: `raise` on an unreadable image, or `skip` it and name it in `errors`.
        limit_train: use only the first so many training images.
        limit_val: the same for validation.
        train_instances: whether training batches have `instances` too.
        seed: of the training order, not negative.
        transform: the host's image processing; may be set later, as the attribute of that name.
        outside: whether images that an annotation file names may lie outside of their folder: by
            names that go up, absolute ones, or links.
        decoder: `pillow`, or `cuda`: JPEGs are decoded on the GPU.
        loading: see `ResumableDataModule`.

    Raises:
        ValueError: for `cuda` without a GPU.
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
        train_instances: bool = False,
        seed: int = 0,
        transform: ImageTransform | None = None,
        outside: bool = False,
        decoder: Decoder = "pillow",
        **loading: Any,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, seed, transform, **loading)
        self.root = Path(root)
        self.outside = outside
        decoding_device(decoder)  # finds out before anything is read
        self.decoder: Decoder = decoder
        self.train_paths = (train_images, train_annotations)
        self.val_paths = (val_images, val_annotations)
        self.on_error = on_error
        self.limit_train, self.limit_val = limit_train, limit_val
        self.train_instances = train_instances

    @property
    def has_validation(self) -> bool:
        return self.val_paths[0] is not None

    def setup(self, stage: str | None = None) -> None:
        """Open the images: for `fit` both sets, for `validate` one; None for both.

        Raises:
            ValueError: if there is no transform, or if images or annotations are missing.
        """
        if stage in (None, "fit"):
            self._loader, self._state = None, {}
            masks = self.train_instances
            self.train_set = self._open(*self.train_paths, self.limit_train, instances=masks)
        if stage in (None, "fit", "validate") and self.has_validation:
            known = None if self.val_paths[1] is not None else False  # where there are masks
            self.val_set = self._open(*self.val_paths, self.limit_val, instances=known)

    def _open(
        self,
        images: str | None,
        annotations: str | None,
        limit: int | None,
        instances: bool | None,
    ) -> Dataset[Any]:
        return self._images(self.root, images, annotations, limit, instances)

    def _images(
        self,
        root: Path,
        images: str | None,
        annotations: str | None,
        limit: int | None,
        instances: bool | None,
    ) -> CocoImages:
        self._need_transform()
        return CocoImages(
            root / (images or ""),
            None if annotations is None else root / annotations,
            self.transform,
            on_error=self.on_error,
            with_instances=instances,
            limit=limit,
            outside=self.outside,
            decoder=self.decoder,
        )

    @property
    def worker_context(self) -> str | None:
        return "spawn" if self.decoder == "cuda" else None


class SceneDataModule(CocoDataModule):
    """Drawn scenes, made on first use.

    Args:
        root: folder that they are written to.
        num_train: training scenes.
        num_val: validation scenes.
        image_size: pixels of an edge.
        scene_seed: of the drawing.
        level: how hard they are to read; `both`: half of them easy, half hard, each in a folder of
            its own, and `limit_train` and `limit_val` are of each.
        options: of `CocoDataModule`.
    """

    def __init__(
        self,
        root: str = "outputs/scenes",
        num_train: int = 2000,
        num_val: int = 200,
        image_size: int = 96,
        scene_seed: int = 0,
        level: Level | Literal["both"] = "easy",
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        self._scenes = (image_size, scene_seed)
        parts = _by_level(level, num_train, num_val)
        self._folders = {own: (self.root / name, counts) for own, name, counts in parts}

    def prepare_data(self) -> None:
        """Draw the scenes that are not there yet."""
        for level, (folder, counts) in self._folders.items():
            write_scenes(folder, *counts, *self._scenes, level=level)

    def _open(
        self,
        images: str | None,
        annotations: str | None,
        limit: int | None,
        instances: bool | None,
    ) -> Dataset[Any]:
        paths = (images, annotations, limit, instances)
        parts = [self._images(folder, *paths) for folder, _ in self._folders.values()]
        return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def _by_level(
    level: Level | Literal["both"], num_train: int, num_val: int
) -> list[tuple[Level, str, tuple[int, int]]]:
    """Levels with their folders in the root, and how many scenes of the two splits are theirs."""
    if level != "both":
        return [(level, "", (num_train, num_val))]
    hard = (num_train // 2, num_val // 2)
    easy = (num_train - hard[0], num_val - hard[1])
    return [("easy", "easy", easy), ("hard", "hard", hard)]


class QuestionSetDataModule(ResumableDataModule):
    """Questions about images: those of one image come one after the other in training too.

    Args:
        batch_size: questions of a training batch, per process.
        val_batch_size: of validation; None for `batch_size`.
        num_workers: processes that load; 0 loads in the training process.
        seed: of the training order, not negative.
        transform: what makes a batch of items, see `ocvtp.training.prompts`; may be set later, as
            the attribute of that name.
        outside: whether images may lie outside of their folder: by names that go up, absolute ones,
            or links.
        loading: see `ResumableDataModule`.
    """

    transform_kind: ClassVar[str] = "a PromptTransform of the model's processor"

    def __init__(
        self,
        batch_size: int = 24,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        transform: QuestionTransform | None = None,
        outside: bool = False,
        **loading: Any,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, seed, transform, **loading)
        self.outside = outside

    @abstractmethod
    def questions(self, split: Literal["train", "val"]) -> QuestionSet:
        """Those of a split, on images that are there.

        Raises:
            ValueError: if files are missing or cannot be used.
        """

    def setup(self, stage: str | None = None) -> None:
        """Read the questions: for `fit` of both sets, for `validate` of one; None for both.

        Raises:
            ValueError: if there is no transform, or the files cannot be used.
        """
        self._need_transform()
        if stage in (None, "fit"):
            self._loader, self._state = None, {}
            self.train_set = self.questions("train")
        if stage in (None, "fit", "validate") and self.has_validation:
            self.val_set = self.questions("val")

    def _stream(self, train_set: Dataset[Any]) -> StreamSampler:
        assert isinstance(train_set, QuestionSet)
        return GroupedSampler(train_set, train_set.owners, self.seed)

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.transform(items)
        return batch


class QuestionDataModule(QuestionSetDataModule):
    """Drawn scenes, made on first use, and questions about them.

    Scenes and questions are the same in every run; the masks of an item are the objects that its
    question names or counts.

    Args:
        root: folder that the scenes are written to, as they were drawn (PNG).
        num_train: training scenes.
        num_val: validation scenes.
        questions: on each scene.
        levels: how hard the scenes are to read; `both`: half of them easy, half hard, each in a
            folder of its own.
        scene_seed: of scenes and questions.
        image_size: pixels of an edge.
        options: of `QuestionSetDataModule`.

    Raises:
        ValueError: for less than one question a scene.
    """

    def __init__(
        self,
        root: str = "outputs/data/questions",
        num_train: int = 3000,
        num_val: int = 200,
        questions: int = 8,
        levels: Level | Literal["both"] = "both",
        scene_seed: int = 0,
        image_size: int = 96,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if questions < 1:
            raise ValueError(f"questions={questions} on a scene; pass at least 1.")
        self.root = Path(root)
        self._num_val, self._num_questions = num_val, questions
        self._scenes = (image_size, scene_seed)
        self._levels = _by_level(levels, num_train, num_val)

    @property
    def has_validation(self) -> bool:
        return self._num_val > 0

    def prepare_data(self) -> None:
        """Draw the scenes that are not there yet."""
        for level, folder, counts in self._levels:
            write_scenes(self.root / folder, *counts, *self._scenes, level=level, lossless=True)

    def questions(self, split: Split) -> QuestionSet:
        num, seed = self._num_questions, self._scenes[1]
        every = [scene_questions(self.root, name, split, num, seed) for _, name, _ in self._levels]
        asked = [question for own in every for question in own]
        return QuestionSet(self.root, asked, outside=self.outside)
