"""`ocvtp resize`: a folder of images, pre-resized for training."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ocvtp.commands import output
from ocvtp.data.resize import resize_folder


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
