"""`ocvtp resize`: a folder of images, pre-resized for training."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ocvtp.commands import output
from ocvtp.data.resize import resize_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("source", help="folder of images")
    parser.add_argument("output", help="folder to write; finished files are kept")
    parser.add_argument("--size", type=int, default=336, help="shorter edge in pixels")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs")
    parser.add_argument("--num-workers", type=int, help="default: one per core")
    output.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Resize and print the counts; 1 if an image failed."""
    report = resize_folder(
        Path(arguments.source),
        Path(arguments.output),
        arguments.size,
        arguments.quality,
        arguments.num_workers,
    )
    facts = asdict(report)
    text = "\n".join(f"{key}: {value}" for key, value in facts.items())
    output.emit(facts, text, arguments.json)
    return 1 if report.failed else 0
