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
        if num_val < 0 or split_seed < 0:
            raise ValueError(f"num_val={num_val}, split_seed={split_seed}; pass 0 or more.")
        if num_val and val_root is not None:
            raise ValueError(
                f"num_val={num_val} holds out images of {root}, and val_root={val_root} names a"
                " folder of others; pass one of the two."
            )
        if val_root is not None and Path(val_root).resolve().is_relative_to(self.root.resolve()):
            raise ValueError(
                f"val_root {val_root} lies in root {root}, whose images are all trained on; pass"
                " two folders side by side, or num_val."
            )
        self._split = (num_val, split_seed)

    @property
    def has_validation(self) -> bool:
        return bool(self._split[0]) or super().has_validation

    def setup(self, stage: str | None = None) -> None:
        """As `CocoDataModule.setup`.

        Raises:
            ValueError: if there is no transform, a folder has no images, or too few to hold out.
        """
        num_val, seed = self._split
        if not num_val:
            super().setup(stage)
            return
        images = self._images(self.root, "", None, None, False)
        out = held_out(len(images), num_val, seed, self.root)
        if stage in (None, "fit"):
            self._loader, self._state = None, {}
            train = np.flatnonzero(~out)[: self.limit_train]
            self.train_set = Subset(images, train)  # type: ignore[arg-type]
        if stage in (None, "fit", "validate"):
            val = np.flatnonzero(out)[: self.limit_val]
            self.val_set = Subset(images, val)  # type: ignore[arg-type]


def held_out(total: int, num_val: int, seed: int, root: str | Path) -> NDArray[np.bool_]:
    """[total] which images the validation has.

    Args:
        total: images that there are. num_val: how many it has. seed: of which ones.
        root: where they are, for the error.

    Raises:
        ValueError: if none is left to train on.
    """
    if num_val >= total:
        raise ValueError(
            f"num_val={num_val} leaves none of the {total} images of {root} to train on;"
            f" pass 1 to {total - 1}."
        )
    out = np.zeros(total, np.bool_)
    out[np.random.default_rng(seed).permutation(total)[:num_val]] = True
    return out
