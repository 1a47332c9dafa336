"""`ocvtp compare`: two benchmarks, and what changed beyond noise."""

from __future__ import annotations

import argparse

from ocvtp.bench import compare as changes
from ocvtp.commands import output


def run(arguments: argparse.Namespace) -> int:
    """Compare and print."""
    if not arguments.tolerance >= 0:
        raise ValueError(f"--tolerance {arguments.tolerance}; pass a share of 0 or more.")
    a, b = changes.load(arguments.a), changes.load(arguments.b)
    found = changes.compare(a, b, arguments.tolerance)
    output.emit(found, changes.text(found), arguments.json)
    return int(arguments.fail_on_regression and found["slower"] > 0)
