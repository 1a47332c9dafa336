"""What a training run shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger

from ocvtp.files import replacing
from ocvtp.visualize import slot_picture


class SlotPictures(pl.Callback):
    """After each validation: the first images with their slot masks.

    They go to `pictures/` of the run's folder, and to TensorBoard where it is a logger.

    Args:
        num_images: how many; at most one validation batch.
        every_n_epochs: how often.
    """

    def __init__(self, num_images: int = 6, every_n_epochs: int = 1) -> None:
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        due = batch_idx == 0 and trainer.current_epoch % self.every_n_epochs == 0
        if not due or trainer.sanity_checking:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "pictures"  # all ranks agree
        if not trainer.is_global_zero or not outputs:
            return
        shown = slice(0, self.num_images)
        pixels = pl_module.encoder.transform.denormalize(batch["pixel_values"][shown].float())
        attention = outputs["attention"][shown].float()
        picture = slot_picture(pixels.cpu(), attention.cpu(), outputs["grid_hw"], self.num_images)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    "val/slots", picture, trainer.global_step, dataformats="HWC"
                )
        with replacing(folder / f"step{trainer.global_step:07d}.png") as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")
