"""What a training run shows."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from ocvtp.images import IMAGE_ERRORS, encoded, read_image
from ocvtp.reporting.files import write_whole
from ocvtp.visualize import draw_kept_tokens, draw_scores, slot_picture

_LOG = logging.getLogger(__name__)


def _side_by_side(images: Sequence[Tensor], masks: Sequence[Tensor]) -> NDArray[np.uint8]:
    """`slot_picture` of images of any sizes, on white.

    Args:
        images: of each [3, H, W] in 0..1. masks: [S, h, w].

    Returns:
        [H', W', 3]
    """
    pairs = zip(images, masks, strict=True)
    drawn = [
        slot_picture(image[None], mask.flatten(1)[None].cpu(), (mask.shape[1], mask.shape[2]))
        for image, mask in pairs
    ]
    highest = max(len(picture) for picture in drawn)
    below = [((0, highest - len(picture)), (0, 0), (0, 0)) for picture in drawn]
    padded = [np.pad(p, b, constant_values=255) for p, b in zip(drawn, below, strict=True)]
    return np.concatenate(padded, axis=1)


class _Pictures(pl.Callback, ABC):
    """Draws the first validation batch, every so many epochs.

    Pictures go to `pictures/` of the run's folder, and to TensorBoard where it is a logger.
    """

    name: ClassVar[str]
    """In TensorBoard."""
    every_n_epochs: int

    @abstractmethod
    def _picture(
        self, trainer: Any, module: Any, outputs: Any, batch: Any
    ) -> NDArray[np.uint8] | None:
        """[H, W, 3]; None where nothing can be drawn."""

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        due = batch_idx == 0 and trainer.current_epoch % self.every_n_epochs == 0
        if not due or trainer.sanity_checking or getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "pictures"  # all ranks agree
        if not trainer.is_global_zero or not outputs:
            return
        picture = self._picture(trainer, pl_module, outputs, batch)
        if picture is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    self.name, picture, trainer.global_step, dataformats="HWC"
                )
        data = encoded(Image.fromarray(picture), "PNG")
        write_whole(folder / f"step{trainer.global_step:07d}.png", data)


class ScorePictures(_Pictures):
    """After each validation: the first questions' images with scores and kept tokens.

    A row for each: the image, its tokens in the colours of their scores' ranks, and those kept at
    each budget. They go to `pictures/` of the run's folder, and to TensorBoard where it is a
    logger. Images of several tiles are left out.

    Args:
        num_questions: how many; at most one validation batch.
        every_n_epochs: how often.
    """

    name: ClassVar[str] = "val/scores"

    def __init__(self, num_questions: int = 6, every_n_epochs: int = 1) -> None:
        self.num_questions = num_questions
        self.every_n_epochs = every_n_epochs

    def _picture(
        self, trainer: Any, module: Any, outputs: Any, batch: Any
    ) -> NDArray[np.uint8] | None:
        grid = outputs["grid_hw"]
        if outputs["scores"].shape[1] != grid[0] * grid[1]:
            return None
        rows, asked = [], trainer.datamodule.val_set
        places = {question.key: place for place, question in enumerate(asked.questions)}
        for number, scores in enumerate(outputs["scores"][: self.num_questions]):
            item = asked[places[batch["keys"][number]]]  # what is unreadable is in no batch
            image = np.asarray(item["image"].convert("RGB"))
            kept = [draw_kept_tokens(image, keep[number], grid) for keep in outputs["kept"]]
            rows.append(np.concatenate([image, draw_scores(image, scores, grid), *kept], axis=1))
        width = min(row.shape[1] for row in rows)
        alike = [row for row in rows if row.shape[1] == width]  # images of one width
        return np.concatenate(alike)


class SlotPictures(_Pictures):
    """After each validation: the first images with their slot masks.

    Of images in tiles, the base views. They go to `pictures/` of the run's folder, and to
    TensorBoard where it is a logger.

    Args:
        num_images: how many; at most one validation batch.
        every_n_epochs: how often.
    """

    name: ClassVar[str] = "val/slots"

    def __init__(self, num_images: int = 6, every_n_epochs: int = 1) -> None:
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs

    def _images(self, batch: dict[str, Any], transform: Any) -> Sequence[Tensor]:
        """Pixel values of the first images, from their files where the batch has none."""
        if "pixel_values" in batch:
            first: Sequence[Tensor] = batch["pixel_values"][: self.num_images]
            return first
        upright = "instances" not in batch  # as in `ocvtp.data.coco.CocoImages`
        paths = batch["paths"][: self.num_images]
        return [transform(read_image(path, upright)) for path in paths]

    def _picture(
        self, trainer: Any, module: Any, outputs: Any, batch: Any
    ) -> NDArray[np.uint8] | None:
        transform = module.encoder.transform
        try:
            images = self._images(batch, transform)
        except IMAGE_ERRORS as error:  # features were extracted from files that are gone
            _LOG.warning("no pictures of slots are drawn, as an image cannot be read: %s", error)
            return None
        views = [image if image.ndim == 3 else image[0] for image in images]
        colours = [transform.denormalize(view.float()).cpu() for view in views]
        return _side_by_side(colours, outputs["masks"][: self.num_images])
