"""`ocvtp list`: every pruner."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ocvtp.commands import output
from ocvtp.pruners.catalog import catalog


def run(arguments: argparse.Namespace) -> int:
    """Print the registry."""
    entries = catalog()
    if arguments.json:
        output.emit({"pruners": [asdict(e) for e in entries]}, "", as_json=True)
        return 0
    table = Table(
        title=f"{len(entries)} pruners", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for column in ("name", "stage", "needs", "budget", "merges", "status", "paper"):
        table.add_column(column, no_wrap=column not in ("needs", "budget"), overflow="fold")
    for e in entries:
        merges, paper = "yes" if e.merges else "no", e.paper_id or "-"
        table.add_row(e.name, e.stage, e.needs, e.budget, merges, e.status, paper)
    console = Console()
    if not console.is_terminal:  # a file or a pipe, which is as wide as it needs to be
        console.width = 120
    console.print(table)
    return 0
