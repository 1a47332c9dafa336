"""`ocvtp teacher`: what a frozen model says of training questions, stored once for every epoch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from ocvtp.commands import options, output
from ocvtp.reporting import command_line
from ocvtp.reporting.folder_lock import claimed
from ocvtp.shipped import with_configs

_DESCRIPTION = """\
Ask the frozen model of a training run every training question once, with all of its visual tokens,
and write what the losses read of it, so that no step asks it again. Settings are those of `ocvtp
train`: a file (--config), and every other word changes one of them. The same command continues what
the folder holds.
"""


def parser() -> argparse.ArgumentParser:
    """The flags of its own."""
    found = options.of_training("teacher", _DESCRIPTION)
    found.add_argument(
        "--shard-size", type=int, default=2000, help="questions of a file (default: %(default)s)"
    )
    return found


def run_words(words: Sequence[str]) -> int:
    """Ask, and say how to train on the answers."""
    arguments, settings = parser().parse_known_args(list(words))
    output.folder(arguments.output)
    configs = with_configs(settings, "train")
    import torch

    from ocvtp.training.run import build
    from ocvtp.training.teacher import write_teacher

    built = build([*configs, "--model.init_args.teacher=null"], "teacher")
    module, data = built.model, built.datamodule
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device)
    data.prepare_data()
    data.setup("fit")
    with claimed(arguments.output, "ocvtp teacher"):
        report = write_teacher(
            module, data.train_set, module.transform, arguments.output, arguments.shard_size
        )
    again = command_line.command("train", *settings, "--model.teacher", arguments.output)
    left_out = f", {len(report.skipped)} left out" if report.skipped else ""
    text = (
        f"{arguments.output} holds {report.questions} questions{left_out},"
        f" {report.bytes / 1e6:.1f} MB\ntrain on them with:  {again}"
    )
    output.emit(asdict(report), text, arguments.json)
    return 0
