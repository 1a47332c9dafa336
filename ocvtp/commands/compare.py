"""`ocvtp compare`: two benchmarks, and what changed beyond noise."""

from __future__ import annotations

import argparse

from ocvtp.bench import compare as changes
from ocvtp.commands import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("a", help="results.json of `ocvtp bench`: before")
    parser.add_argument("b", help="results.json of `ocvtp bench`: after")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=changes.TOLERANCE,
        help="smaller changes are not flagged (default: %(default)s)",
    )
    parser.add_argument(
        "--fail-on-regression", action="store_true", help="exit with 1 if anything is slower"
    )
    output.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare and print."""
    if not arguments.tolerance >= 0:
        raise ValueError(f"--tolerance {arguments.tolerance}; pass a share of 0 or more.")
    a, b = changes.load(arguments.a), changes.load(arguments.b)
    found = changes.compare(a, b, arguments.tolerance)
    output.emit(found, changes.text(found), arguments.json)
    return int(arguments.fail_on_regression and found["slower"] > 0)
