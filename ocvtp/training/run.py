"""`ocvtp train`: a YAML file and command-line settings to a trained checkpoint."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
)
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities import rank_zero

from ocvtp.reporting import command_line
from ocvtp.reporting.folder_lock import claimed
from ocvtp.reporting.plain_text import one_line
from ocvtp.training.averaging import NetworkAverage
from ocvtp.training.base import NetworkModule
from ocvtp.training.check import Check
from ocvtp.training.check import check as check_run
from ocvtp.training.errors import clear_errors, restoring
from ocvtp.training.last import Keeping, LastCheckpoint
from ocvtp.training.lifecycle import (
    Interrupted,
    LateStart,
    SaveConfig,
    refuse_unwritable,
    write_whole_checkpoints,
)
from ocvtp.training.module import PrunerModule
from ocvtp.training.pace import Pace
from ocvtp.training.progress import ParameterCounts, RunProgress
from ocvtp.training.resume import (
    find_checkpoint,
    read_checkpoint,
    refuse_another_run,
    requeued_checkpoint,
    run_settings,
)
from ocvtp.training.settings import names_module, refuse_bombs, settle
from ocvtp.training.signals import Signals
from ocvtp.training.wrong_settings import explain

Command = Literal["train", "extract", "teacher"]
_BY_MODULE = "auto"
"""`checkpoint.monitor`: the figure that `NetworkModule.monitor` names."""
_DESCRIPTION = (
    "Train an OC-pruner. A file of settings comes first (--config); every other word changes one of"
    " them. `ocvtp train --help` alone lists those that are changed first."
)


_OPTIONS: dict[str, dict[str, Any]] = {
    "output": {
        "type": str | None,
        "default": None,
        "help": "folder of all that the run writes: checkpoints, logs, pictures; another name of"
        " trainer.default_root_dir",
    },
    "resume": {
        "type": str | None,
        "default": None,
        "help": "checkpoint to continue from; `last` or `best`: of the run's own folder; `auto`:"
        " the last one there, if there is any",
    },
    "check": {
        "action": "store_true",
        "help": "try a few steps and keep nothing: images/s, memory, hours and disk of the run",
    },
    "compile": {
        "type": str | None,
        "default": None,
        "help": "compile the network by this backend of torch.compile, e.g. inductor",
    },
    "ema": {
        "type": float | None,
        "default": None,
        "help": "validate and keep a moving average of the weights with this decay, e.g. 0.999",
    },
    "whole_epochs": {
        "type": bool,
        "default": False,
        "help": "train on every image in every epoch, those too that do not fill its last batch",
    },
    "matmul_precision": {
        "type": Literal["highest", "high", "medium"],
        "default": "highest",
        "help": "of fp32 matrix products on a GPU: high uses TF32, which is several times as fast",
    },
}
"""Settings of a run that are neither of its model, its data nor Lightning's trainer."""


@dataclass(frozen=True)
class TrainingResult:
    """Where the run left its files.

    Args:
        best: checkpoint of the best validation, by `checkpoint.monitor`; of the last step without a
            validation.
        last: of the last step. Both are empty if nothing is kept (fast_dev_run).
        best_score: that figure.
        note: why nothing was trained, kept or chosen; empty if it all was.
        is_main: whether this process is the first of its run, the one that prints.
    """

    best: str
    last: str
    best_score: float | None
    note: str = ""
    is_main: bool = True


class TrainingStopped(KeyboardInterrupt):
    """A run was stopped by a signal; its text says where, and how to continue.

    Attributes:
        checkpoint: from which it can be continued exactly; None if there is none.
        exit_status: the one that a shell expects.
        is_main: whether this process is the first of its run, the one to speak.
    """

    def __init__(
        self, message: str, checkpoint: str | None, number: int, is_main: bool = True
    ) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint
        self.is_main = is_main
        self.exit_status = 128 + number


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a class in the settings: the outer parser reports
            super().error(message, ex)
        sys.stderr.write(f"ocvtp: error: {one_line(explain(self, message))}\n")
        self.exit(2)


class _TrainCLI(LightningCLI):
    """The command line of `train`: LightningCLI's, with settings of a run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, options in _OPTIONS.items():
            parser.add_argument(f"--{name}", **options)
        parser.link_arguments(
            "model", "data.init_args.transform", compute_fn=_transform, apply_on="instantiate"
        )
        parser.add_class_arguments(Keeping, "last")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": _BY_MODULE,
                "checkpoint.mode": "min",
                "checkpoint.filename": "best",
                "checkpoint.save_last": True,
                "checkpoint.save_top_k": 1,
                "checkpoint.enable_version_counter": False,
                # There are none, and it would make the loggers' folders before training starts.
                "trainer.enable_autolog_hparams": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        assert isinstance(args, list)
        settle(parser, args, self.config)

    def before_instantiate_classes(self) -> None:
        if "load_tower" not in self.config.model:  # another module, with no tower of its own
            return
        module, _, name = self.config.data.class_path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        self.config.model.load_tower = not getattr(kind, "brings_tokens", False)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        shown: list[pl.Callback] = self.model.shown()
        shown.append(Pace())
        trainer = self.config.trainer
        if trainer.enable_progress_bar is not False and not self._names(ProgressBar):
            shown.append(RunProgress())
        if trainer.enable_model_summary is not False and not self._names(ModelSummary):
            shown.append(ParameterCounts())
        if self.config.ema is not None:
            shown.append(NetworkAverage(self.config.ema))
        if self.config.trainer.logger:
            shown.insert(0, LearningRateMonitor("step"))
        self.trainer_defaults["callbacks"] = shown
        return super().instantiate_trainer(**kwargs)

    def _names(self, kind: type[pl.Callback]) -> bool:
        """Whether the settings name such a callback."""
        named = self.config_init.trainer.callbacks or []
        named = named if isinstance(named, list) else [named]
        return any(isinstance(one, kind) for one in named)


def _transform(model: NetworkModule) -> Any:
    return model.transform


class _DataCLI(_TrainCLI):
    """The same without a trainer, whose settings may be of another machine."""

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        return None


def build(args: Sequence[str] | None = None, command: Command = "train") -> LightningCLI:
    """Parse and build trainer, module and data of `ocvtp train`, without training.

    Args:
        args: command-line words; None for those of the process.
        command: whose settings they are; `extract` and `teacher` leave the trainer out.

    Raises:
        SystemExit: for settings that do not parse.
        ValueError: for settings that make no sense.
    """
    # The words may be those of the process, without the name of the command.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    # The frozen tower is meant to be in evaluation mode.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    # They are the same in every process already.
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\('(val|run)/")
    # Lightning calls PyTorch so, and praises another logger wherever that is not installed.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    logging.getLogger(rank_zero.__name__).addFilter(_is_no_advice)
    with clear_errors(building=True):
        words = list(sys.argv[1:] if args is None else args)
        refuse_bombs(words)
        is_named = names_module(words)
        if is_named and command == "extract":
            raise ValueError(
                "`ocvtp extract` stores what a vision tower gives, and model.class_path names"
                " another module than the one that reads it; for a SelectorModule there is"
                " `ocvtp teacher`."
            )
        if not is_named and command == "teacher":
            raise ValueError(
                "`ocvtp teacher` stores what a frozen language model says, and these settings have"
                " none: model.class_path is missing; pass those of a SelectorModule."
            )
        cli = (_TrainCLI if command == "train" else _DataCLI)(
            NetworkModule if is_named else PrunerModule,  # type: ignore[type-abstract]
            pl.LightningDataModule,
            subclass_mode_model=is_named,
            subclass_mode_data=True,
            run=False,
            args=words,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": []},
            parser_class=_Parser,
            parser_kwargs={
                "prog": f"ocvtp {command}",
                "usage": "%(prog)s --config FILE|NAME [--output DIR] [--resume CKPT]"
                " [--SETTING VALUE]",
                "description": _DESCRIPTION,
                "allow_abbrev": False,
            },
        )
    if command == "train":
        _apply_run_settings(cli)
    return cli


def _is_no_advice(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return "💡 Tip: " not in said and "Skipping setting a default `ModelSummary`" not in said


def _apply_run_settings(cli: LightningCLI) -> None:
    """What settings of the whole run mean for its model, data and checkpoints."""
    if cli.config.whole_epochs:
        cli.datamodule.whole_epochs = True
    cli.model.run_settings = run_settings(cli.config_dump)
    if cli.config.compile is not None:
        cli.model.compile_network(cli.config.compile)
    checkpoint = cli.config_init.checkpoint
    if checkpoint.monitor == _BY_MODULE:
        checkpoint.monitor = cli.model.monitor


def train(args: Sequence[str] | None = None) -> TrainingResult:
    """Train an OC-pruner: `--config configs/train/NAME.yaml [--resume CKPT] [settings]`.

    Nothing is written before the data is open and the model is built. Checkpoints of an earlier run
    in the same folder are renamed after the first step.

    Args:
        args: command-line words; None for those of the process.

    Returns:
        where the checkpoints are.

    Raises:
        SystemExit: for settings that do not parse.
        ValueError: for settings that make no sense, and a checkpoint that cannot be continued.
        TrainingStopped: at Ctrl-C, SIGTERM or SIGUSR1, after `last.ckpt` was written.
    """
    words = list(sys.argv[1:] if args is None else args)
    cli = build(words)
    trainer: Any = cli.trainer
    checkpoint: ModelCheckpoint = cli.config_init.checkpoint
    if not getattr(cli.datamodule, "has_validation", True) or not trainer.limit_val_batches:
        checkpoint.monitor = None  # no figure to compare: keep the last
    keeps_last = bool(checkpoint.save_last) and not trainer.fast_dev_run
    checkpoint.save_last = False  # Lightning writes it beside other checkpoints alone
    folder = Path(checkpoint.dirpath or ".")
    for place in (cli.config.output, folder):
        refuse_unwritable(Path(place))
    resume, requeued = _continued(cli)
    own = requeued or resume is not None and Path(resume).resolve().parent == folder.resolve()
    start, signals = LateStart(trainer, None if own else folder), Signals()
    stop = LastCheckpoint(checkpoint, signals, cli.config_init.last, keeps_last)
    callbacks: list[pl.Callback] = trainer.callbacks
    callbacks.insert(0, start)
    callbacks.append(stop)
    write_whole_checkpoints(trainer)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Of an epoch that ends before its validation; where none ran at all, `_result` says so.
    warnings.filterwarnings("ignore", message=r"`ModelCheckpoint\(monitor=.* could not find the")
    try:
        with (
            _alone(trainer, cli.config.output),
            clear_errors(),
            restoring(resume, start),
            signals.listening(),
            matmul_precision(cli.config.matmul_precision),
        ):
            trainer.fit(cli.model, cli.datamodule, ckpt_path=resume, weights_only=True)
    except Interrupted:
        raise _stopped(trainer, checkpoint, stop, signals, words) from None
    return _result(trainer, checkpoint, stop.steps, resume)


def _continued(cli: LightningCLI) -> tuple[str | None, bool]:
    """The checkpoint that a run goes on from, which is one of this run; whether SLURM left it."""
    folder = Path(cli.config_init.checkpoint.dirpath or ".")
    requeued = path = requeued_checkpoint(cli.trainer, folder)
    if path is None and cli.config.resume is not None:
        path = find_checkpoint(cli.config.resume, folder)
    if path is not None:
        refuse_another_run(path, read_checkpoint(path), cli.model)
    return path, requeued is not None


def _alone(trainer: Any, output: str) -> AbstractContextManager[None]:
    """No other run writes to its folder; the first process of a run stands for all."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    places = (0, 0) if environment is None else (environment.node_rank(), environment.local_rank())
    if trainer.fast_dev_run or any(places):  # its rank is not set yet where it starts the others
        return nullcontext()
    return claimed(output, "ocvtp train")


def check(args: Sequence[str] | None = None) -> Check:
    """What a run with these words would take: a few of its steps, of which nothing is kept.

    Args:
        args: command-line words; None for those of the process.

    Raises:
        SystemExit: for settings that do not parse.
        ValueError: for settings that make no sense, and a checkpoint that cannot be continued.
        TrainingStopped: at Ctrl-C, SIGTERM or SIGUSR1.
    """
    cli = build(args)
    output = cli.config.output
    refuse_unwritable(Path(output))
    resume, _ = _continued(cli)
    signals = Signals()
    try:
        with (
            clear_errors(),
            signals.listening(),
            matmul_precision(cli.config.matmul_precision),
        ):
            return check_run(cli.trainer, cli.model, cli.datamodule, output, signals, resume)
    except Interrupted:
        number = signals.number or signal.SIGINT
        message = "stopped; a check keeps nothing"
        raise TrainingStopped(message, None, number, cli.trainer.is_global_zero) from None


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Of fp32 matrix products in the block, see `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _result(
    trainer: Any, checkpoint: ModelCheckpoint, steps: int, resume: str | None
) -> TrainingResult:
    end = f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
    best, last = checkpoint.best_model_path, checkpoint.last_model_path
    note = ""
    if trainer.fast_dev_run:
        best = last = ""
        note = f"fast_dev_run tried {steps} steps and keeps nothing; leave it out to train"
    elif not steps and resume is not None:
        best, last = best or resume, last or resume
        note = (
            f"nothing was left to train: {resume} is at step {trainer.global_step}, where this run"
            f" ends ({end}); raise --trainer.max_epochs or --trainer.max_steps to continue"
        )
    elif not steps:
        note = f"no step was taken ({end}, limit_train_batches={trainer.limit_train_batches})"
    elif not best:
        best, note = last, "no validation ran: the best checkpoint is the last one"
    best_score = checkpoint.best_model_score
    score = None if best_score is None else float(best_score)
    return TrainingResult(best, last or best, score, note, trainer.is_global_zero)


def _stopped(
    trainer: pl.Trainer,
    checkpoint: ModelCheckpoint,
    stop: LastCheckpoint,
    signals: Signals,
    words: Sequence[str],
) -> TrainingStopped:
    saved, where = stop.saved, f"stopped after {trainer.global_step} steps"
    if saved is None and stop.steps and Path(checkpoint.last_model_path).is_file():
        saved, where = checkpoint.last_model_path, f"{where}, and saved none of the latest ones"
    if stop.requeued:
        message = f"{where}; SLURM runs the job again, which goes on from there"
    elif saved is not None:
        kept = [word for word in words if not word.startswith("--resume=")]
        if "--resume" in kept:
            at = kept.index("--resume")
            del kept[at : at + 2]
        again = command_line.command("train", *kept, "--resume", saved)
        message = f"{where}; continue with:  {again}"
    elif stop.steps:
        message = f"{where}; there is no checkpoint yet"
    else:
        message = "stopped before the first step; there is no checkpoint"
    number = signals.number or signal.SIGINT
    return TrainingStopped(message, saved, number, trainer.is_global_zero)
