"""`ocvtp list`: every pruner; with a model, which of them it can run."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ocvtp.commands import options, output
from ocvtp.pruners.catalog import catalog

_ORDER = ("runs", "needs", "cannot")


def run(arguments: argparse.Namespace) -> int:
    """Print the registry."""
    if arguments.model is not None:
        return _run_on(arguments)
    options.refuse_without_model(arguments)
    entries = catalog()
    if arguments.json:
        output.emit({"pruners": [asdict(e) for e in entries]}, "", as_json=True)
        return 0
    table = _table(f"{len(entries)} pruners")
    wide = ("needs", "budget", "settings")
    for column in ("name", "stage", "needs", "budget", "merges", "settings", "status", "paper"):
        table.add_column(column, no_wrap=column not in wide, overflow="fold")
    for e in entries:
        merges, paper = "yes" if e.merges else "no", e.paper_id or "-"
        named = ", ".join(e.settings) or "-"
        table.add_row(e.name, e.stage, e.needs, e.budget, merges, named, e.status, paper)
    _print(table)
    return 0


def _run_on(arguments: argparse.Namespace) -> int:
    """Print what runs on a model, and what the others would need."""
    from ocvtp.evaluation.runner import Subject
    from ocvtp.hosts.loading import check_model, load_model
    from ocvtp.recommend.fits import fits

    place = (arguments.model, arguments.dtype, arguments.device)
    check_model(*place, (), arguments.text_tower, reads_clip=arguments.text_tower is not None)
    found = fits(Subject(*load_model(*place), arguments.model, arguments.text_tower))
    stages = {entry.name: entry.stage for entry in catalog()}
    if arguments.json:
        rows = [asdict(fit) | {"stage": stages[fit.name]} for fit in found]
        output.emit({"model": arguments.model, "pruners": rows}, "", as_json=True)
        return 0
    runs = sum(fit.status == "runs" for fit in found)
    table = _table(f"{runs} of {len(found)} pruners run on {arguments.model} as it is")
    for column in ("name", "stage", "here", "why, and what to do"):
        table.add_column(column, no_wrap=column in ("name", "here"), overflow="fold")
    for fit in sorted(found, key=lambda fit: _ORDER.index(fit.status)):
        table.add_row(fit.name, stages[fit.name], fit.status, fit.what)
    _print(table)
    return 0


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)


def _print(table: Table) -> None:
    console = Console(markup=False, emoji=False)  # text in brackets is text
    if not console.is_terminal:  # a file or a pipe, which is as wide as it needs to be
        console.width = 120
    console.print(table)
