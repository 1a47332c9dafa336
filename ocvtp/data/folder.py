"""The LightningDataModule of any folder of images, without annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from ocvtp.data.module import CocoDataModule


class FolderDataModule(CocoDataModule):
    """All images of a folder and of those below it, sorted by path.

    Args:
        root: folder of the training images.
        val_root: folder of the validation images, which may not lie in `root`; None for none.
        num_val: so many images of `root` are held out for the validation instead.
        split_seed: of which ones; apart from `seed`, so that runs of several seeds share them.
        options: of `CocoDataModule`, without those of annotations.

    Raises:
        ValueError: for `num_val` and `val_root` at once, or out of range.
    """

    def __init__(
        self,
        root: str,
        val_root: str | None = None,
        num_val: int = 0,
        split_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            train_images="",
            train_annotations=None,
            val_images=None if val_root is None else str(Path(val_root).absolute()),
            val_annotations=None,
            train_instances=False,
            **options,
        )
        self._held_out = HeldOut(num_val, split_seed, root, val_root)
        if val_root is not None and Path(val_root).resolve().is_relative_to(self.root.resolve()):
            raise ValueError(
                f"val_root {val_root} lies in root {root}, whose images are all trained on; pass"
                " two folders side by side, or num_val."
            )

    @property
    def has_validation(self) -> bool:
        return bool(self._held_out) or super().has_validation

    def setup(self, stage: str | None = None) -> None:
        """As `CocoDataModule.setup`.

        Raises:
            ValueError: if there is no transform, a folder has no images, or too few to hold out.
        """
        if not self._held_out:
            super().setup(stage)
            return
        images = self._images(self.root, "", None, None, False)
        train, val = self._held_out.parts(len(images))
        if stage in (None, "fit"):
            self._loader, self._state = None, {}
            self.train_set = Subset(images, train[: self.limit_train])  # type: ignore[arg-type]
        if stage in (None, "fit", "validate"):
            self.val_set = Subset(images, val[: self.limit_val])  # type: ignore[arg-type]


class HeldOut:
    """Images of the training ones that the validation has.

    Args:
        num_val: how many; 0 for none.
        seed: of which ones.
        root: where the training images are. val_root: where other ones of the validation are.

    Raises:
        ValueError: for `num_val` and `val_root` at once, or a number out of range.
    """

    def __init__(self, num_val: int, seed: int, root: str, val_root: str | None) -> None:
        for name, number in (("num_val", num_val), ("split_seed", seed)):
            if number < 0:
                raise ValueError(f"{name}={number}; pass 0 or more.")
        if num_val and val_root is not None:
            raise ValueError(
                f"num_val={num_val} holds out images of {root}, and val_root={val_root} names"
                " others; pass one of the two."
            )
        self._num_val, self._seed, self._root = num_val, seed, root

    def __bool__(self) -> bool:
        return self._num_val > 0

    def parts(self, total: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the images that are trained on, and of those that are held out, ascending.

        Args:
            total: images that there are.

        Raises:
            ValueError: if none is left to train on.
        """
        if self._num_val >= total:
            raise ValueError(
                f"num_val={self._num_val} leaves none of the {total} images of {self._root} to"
                f" train on; pass 1 to {total - 1}."
            )
        order = np.random.default_rng(self._seed).permutation(total)
        return np.sort(order[self._num_val :]), np.sort(order[: self._num_val])
