"""`ocvtp extract`: the tower of a training run, run once; its settings are those of `train`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ocvtp.commands import options, output
from ocvtp.reporting import command_line
from ocvtp.reporting.folder_lock import claimed
from ocvtp.shipped import with_configs

if TYPE_CHECKING:
    from ocvtp.training.extraction import ExtractionReport

_DESCRIPTION = """\
Run the frozen tower of a training run once over its images, and write what training reads of it, so
that no epoch runs it again. Settings are those of `ocvtp train`: a file (--config), and every other
word changes one of them, e.g. --data.root DIR --data.batch_size 32. The same command continues what
the folder holds.
"""
_FEATURES = ("--data", "ocvtp.data.features.FeatureDataModule", "--data.root")


def parser() -> argparse.ArgumentParser:
    """The flags of its own."""
    found = options.of_training("extract", _DESCRIPTION)
    found.add_argument(
        "--dtype",
        default="float16",
        choices=("float16", "bfloat16", "float32"),
        help="of what is stored (default: %(default)s)",
    )
    found.add_argument(
        "--shard-size", type=int, default=2000, help="images of a file (default: %(default)s)"
    )
    found.add_argument(
        "--views",
        default="plain",
        choices=("plain", "flip"),
        help="flip: training images mirrored too; each epoch draws one view of every image",
    )
    found.add_argument(
        "--crops",
        type=int,
        default=0,
        help="views of every training image, each in a window elsewhere (default: %(default)s)",
    )
    found.add_argument("--rank", type=int, help="which part of the files, from 0")
    found.add_argument(
        "--ranks", type=int, help="processes that share the work (default: as torchrun or SLURM)"
    )
    return found


def run_words(words: Sequence[str]) -> int:
    """Extract, and say how to train on it."""
    arguments, settings = parser().parse_known_args(list(words))
    output.folder(arguments.output)
    if (arguments.rank is None) != (arguments.ranks is None):
        raise ValueError("--rank and --ranks belong together; pass both, or none.")
    configs = with_configs(settings, "train")
    import torch

    from ocvtp.training.extraction import Extraction, gigabytes, this_rank
    from ocvtp.training.run import build

    rank, ranks, local = this_rank()
    if arguments.rank is not None:
        rank, ranks = arguments.rank, arguments.ranks
    gpus = torch.cuda.device_count()
    device = arguments.device or (f"cuda:{local % gpus}" if gpus else "cpu")
    built = build(configs, "extract")
    extraction = Extraction(
        built.model,
        built.datamodule,
        arguments.output,
        arguments.dtype,
        arguments.shard_size,
        arguments.views,
        rank,
        ranks,
        device,
        arguments.crops,
    )
    missing = gigabytes(extraction.bytes_missing)
    sys.stderr.write(f"{arguments.output}: {missing} are still to be written; tower on {device}\n")
    with claimed(arguments.output, "ocvtp extract", f"{rank}-of-{ranks}"):
        report = extraction.run()
    output.emit(asdict(report), _text(report, arguments.output, settings), arguments.json)
    return 0


def _text(report: ExtractionReport, folder: str, settings: Sequence[str]) -> str:
    if report.missing:
        return (
            f"wrote {report.written} files; {report.missing} of other ranks are missing, and the"
            " last of them finishes the folder"
        )
    counts = ", ".join(f"{count} {split}" for split, count in report.images.items())
    left_out = f", {len(report.skipped)} left out" if report.skipped else ""
    again = command_line.command("train", *_without_data(settings), *_FEATURES, folder)
    return f"{folder} holds {counts} images{left_out}\ntrain on them with:  {again}"


def _without_data(words: Sequence[str]) -> list[str]:
    """The words but those of the data of images, which features have not."""
    left: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--data"):
            left.append(word)
        elif "=" not in word:
            next(rest, None)
    return left
