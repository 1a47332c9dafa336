"""`ocvtp runs`: what training runs have in common, where they differ, and which is the best."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ocvtp.commands import output
from ocvtp.reporting.plain_text import terminal
from ocvtp.reporting.training_runs import Run, differing, figures_of, find_runs, is_higher_better

_FIRST = ("val/loss", "val/coverage_residual", "val/unique_tokens", "val/accuracy", "val/mbo_i")
_COLUMNS = 5


def run(arguments: argparse.Namespace) -> int:
    """Read, print and draw."""
    path = None if arguments.plot is None else output.file(arguments.plot)
    runs, notes = find_runs(arguments.folders)
    figures = _figures(arguments.figures, figures_of(runs))
    settings = differing(runs)
    if path is not None:
        from ocvtp.reporting.figure_files import save_figure
        from ocvtp.reporting.training_plots import plot_runs

        save_figure(plot_runs(runs, figures), path, dpi=120)
        notes = [*notes, f"wrote {path}"]
    if arguments.json:
        output.emit(_facts(runs, settings, notes), "", as_json=True)
        return 0
    console = Console()
    if not console.is_terminal:  # a file or a pipe, which is as wide as it needs to be
        console.width = 200
    console.print(_table(runs, settings, figures))
    for note in notes:
        console.print(_plain(note), soft_wrap=True, highlight=False)
    return 0


def _figures(asked: Sequence[str] | None, there: Sequence[str]) -> list[str]:
    """Those that are shown.

    Raises:
        ValueError: for one that no run has.
    """
    if not asked:
        first = [name for name in _FIRST if name in there]
        return [*first, *(name for name in there if name not in first)][:_COLUMNS]
    found = [name if name in there else f"val/{name}" for name in asked]
    if missing := [name for name in found if name not in there]:
        which = ", ".join(there) or "none, as nothing was validated"
        raise ValueError(f"no run has the figure {missing[0]!r}; there are: {which}.")
    return found


def _table(runs: Sequence[Run], settings: dict[str, list[Any]], figures: Sequence[str]) -> Table:
    title = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("steps", justify="right")
    for name in figures:
        way = "highest" if is_higher_better(name) else "lowest"
        table.add_column(f"{_plain(name)}\n{way} @ step", justify="right")
    table.add_column("settings that differ", overflow="fold")
    table.add_column("checkpoints", overflow="fold")
    best = {name: _best_of_all(runs, name) for name in figures}
    for number, one in enumerate(runs):
        cells = []
        for name in figures:
            found = one.best(name)
            text = "-" if found is None else f"{found[0]:.4g} @ {found[1] + 1}"
            is_best = len(runs) > 1 and found is not None and found[0] == best[name]
            cells.append(f"[bold]{text}[/bold]" if is_best else text)
        told = [f"{n}={values[number]}" for n, values in settings.items() if n in one.settings]
        kept = ", ".join(name.removesuffix(".ckpt") for name in one.checkpoints) or "none"
        said = "".join(f"\n({note})" for note in one.notes)
        table.add_row(
            _plain(one.name), str(one.steps), *cells, _plain("\n".join(told)), _plain(kept + said)
        )
    return table


def _plain(text: str) -> str:
    """Text of others, which neither rich nor a terminal obeys."""
    return escape(terminal(text))


def _best_of_all(runs: Sequence[Run], figure: str) -> float | None:
    values = [found[0] for one in runs if (found := one.best(figure)) is not None]
    if not values:
        return None
    return max(values) if is_higher_better(figure) else min(values)


def _facts(
    runs: Sequence[Run], settings: dict[str, list[Any]], notes: Sequence[str]
) -> dict[str, Any]:
    found = []
    for number, one in enumerate(runs):
        best = {name: one.best(name) for name in figures_of([one])}
        found.append(
            {
                "name": one.name,
                "folder": str(Path(one.folder)),
                "steps": one.steps,
                "best": {k: {"value": v[0], "step": v[1] + 1} for k, v in best.items() if v},
                "settings_that_differ": {k: values[number] for k, values in settings.items()},
                "settings": one.settings,
                "curves": one.curves,
                "checkpoints": one.checkpoints,
                "notes": one.notes,
            }
        )
    return {"runs": found, "notes": list(notes)}
