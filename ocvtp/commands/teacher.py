"""`ocvtp teacher`: what a frozen model says of training questions, stored once for every epoch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ocvtp.commands import options, output
from ocvtp.reporting import command_line
from ocvtp.reporting.folder_lock import claimed
from ocvtp.reporting.progress import progress_bar
from ocvtp.shipped import with_configs

_DESCRIPTION = """\
Ask the frozen model of a training run every training question once, with all of its visual tokens,
and write what the losses read of it, so that no step asks it again. Settings are those of `ocvtp
train`: a file (--config), and every other word changes one of them. The same command continues what
the folder holds. With --rank nothing is written: which layer is worth learning from?
"""


def parser() -> argparse.ArgumentParser:
    """The flags of its own."""
    instead = {"--rank": "how well it answers validation questions with each layer's own top K"}
    found = options.of_training("teacher", _DESCRIPTION, instead)
    found.add_argument(
        "--shard-size", type=int, default=2000, help="questions of a file (default: %(default)s)"
    )
    return found


def run_words(words: Sequence[str]) -> int:
    """Ask, and say how to train on the answers."""
    arguments, settings = parser().parse_known_args(list(words))
    if arguments.output is not None:
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
    if arguments.rank:
        return _rank(module, data, arguments.json)
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


def _rank(module: Any, data: Any, as_json: bool) -> int:
    """Ask about validation questions, and print."""
    from ocvtp.evaluation.teacher_rank import rank_layers, to_markdown

    if not data.has_validation:
        raise ValueError("--rank asks validation questions, and these settings have none.")
    with progress_bar() as progress:
        bar = progress.add_task("questions", total=len(data.val_set))
        facts = rank_layers(module, data.val_dataloader(), lambda n: progress.advance(bar, n))
    output.emit(facts, to_markdown(facts), as_json)
    return 0
