"""`ocvtp train`: a YAML file and command-line settings to a trained checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from ocvtp.training.callbacks import SlotPictures
from ocvtp.training.module import OCPrunerModule

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Where the run left its files.

    Args:
        best: checkpoint of the lowest validation loss. last: of the last step.
        best_score: that loss.
    """

    best: str
    last: str
    best_score: float | None


class _TrainCLI(LightningCLI):
    """The command line of `train`: LightningCLI's, with --resume."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--resume", type=str | None, default=None, help="checkpoint to continue from"
        )
        parser.link_arguments(
            "model", "data.init_args.transform", compute_fn=_transform, apply_on="instantiate"
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.mode": "min",
                "checkpoint.filename": "best",
                "checkpoint.save_last": True,
                "checkpoint.save_top_k": 1,
                "checkpoint.enable_version_counter": False,
            }
        )


def _transform(model: OCPrunerModule) -> Any:
    return model.encoder.transform


def _set_aside(folder: Path) -> None:
    """Rename a folder that holds an earlier run's checkpoints, so that none is overwritten."""
    if any(folder.glob("*.ckpt")):
        names = (folder.with_name(f"{folder.name}.{i}") for i in count(1))
        free = next(name for name in names if not name.exists())
        folder.rename(free)
        _LOG.warning("an earlier run's checkpoints are now in %s", free)


def build(args: Sequence[str] | None = None) -> LightningCLI:
    """Parse and build trainer, module and data of `ocvtp train`, without training."""
    # The words may well be those of the process, without the name of the command.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    # The frozen tower is meant to be in evaluation mode.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    return _TrainCLI(
        OCPrunerModule,
        pl.LightningDataModule,
        subclass_mode_data=True,
        run=False,
        args=None if args is None else list(args),
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [LearningRateMonitor("step"), SlotPictures()]},
        parser_kwargs={"prog": "ocvtp train", "description": train.__doc__},
    )


def train(args: Sequence[str] | None = None) -> TrainingResult:
    """Train an OC-pruner: `--config configs/train/NAME.yaml [--resume CKPT] [settings]`.

    Args:
        args: command-line words; None for those of the process.

    Returns:
        where the checkpoints are.

    Raises:
        SystemExit: for settings that do not parse.
        ValueError: for settings that make no sense.
    """
    cli = build(args)
    checkpoint = cli.trainer.checkpoint_callback
    assert isinstance(checkpoint, ModelCheckpoint)
    if not getattr(cli.datamodule, "has_validation", True):
        checkpoint.monitor = None  # nothing to be best at: keep the last
    if cli.config.resume is None and checkpoint.dirpath and cli.trainer.is_global_zero:
        _set_aside(Path(checkpoint.dirpath))
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.resume, weights_only=True)
    score = checkpoint.best_model_score
    return TrainingResult(
        best=checkpoint.best_model_path,
        last=checkpoint.last_model_path,
        best_score=None if score is None else float(score),
    )
