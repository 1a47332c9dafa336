"""`ocvtp table`: a table for a paper, of what `evaluate` and `bench` wrote."""

from __future__ import annotations

import argparse

from ocvtp.bench import paper_columns as of_times
from ocvtp.commands import output
from ocvtp.commands.result_files import narrowed, read_files, sources
from ocvtp.evaluation import paper_columns as of_figures
from ocvtp.evaluation.scores import unpacked
from ocvtp.reporting.chosen import Chosen
from ocvtp.reporting.paper_table import FORMATS, Column, PaperTable


def run(arguments: argparse.Namespace) -> int:
    """Read, set beside each other, and print or write."""
    path = None if arguments.output is None else output.file(arguments.output)
    text = FORMATS[arguments.format](_table(arguments))
    facts = {"format": arguments.format, "output": arguments.output, "table": text}
    output.print_or_write(text, path, facts, arguments.json)
    return 0


def _table(arguments: argparse.Namespace) -> PaperTable:
    if arguments.digits is not None and not 0 <= arguments.digits <= 10:
        raise ValueError(f"--digits {arguments.digits}; pass 0 to 10.")
    chosen = Chosen(arguments.only, arguments.metric, arguments.num_keep, arguments.keep_ratio)
    files = read_files(arguments.results, chosen)
    columns: list[Column] = []
    notes: list[str] = []
    for file, source in zip(files, sources(files), strict=True):
        own = narrowed(chosen, file, files)
        if file.is_bench:
            columns += of_times.columns(file.facts, own, arguments.bold, arguments.digits, source)
            notes += of_times.notes(file.facts, own, arguments.bold)
            continue
        scores = unpacked(file.facts, str(file.path))
        columns += of_figures.columns(
            file.facts, scores, own, arguments.bold, arguments.digits, source
        )
        notes += of_figures.notes(file.facts, scores, own, arguments.bold)
    if not columns:
        raise ValueError(
            f"nothing is left of {', '.join(arguments.results)}: no pruner has a figure at these"
            " budgets; leave --num-keep or --keep-ratio out to see which there are."
        )
    label = "-".join(dict.fromkeys(file.title[0] for file in files))
    return PaperTable(columns, list(dict.fromkeys(notes)), arguments.with_interval, label)
