"""Columns of a paper's table from a benchmark's results.json: a metric at a budget each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from statistics import fmean
from typing import Any

from ocvtp.bench import statistics
from ocvtp.bench.report import cell_name
from ocvtp.bench.samples import METRICS
from ocvtp.bench.summary import is_control, label_of, series
from ocvtp.choices import Bold
from ocvtp.reporting.chosen import Chosen
from ocvtp.reporting.paper_table import Column, Entry, Kind, Row, overlap, with_bold
from ocvtp.reporting.plain_text import better

Facts = Mapping[str, Any]
RATIO = "/unpruned"
"""After the name of a metric: over the bare model's."""
_TITLES = {"ttft": "TTFT", "tpot": "TPOT"}
_OWN = "its own budget"


def metrics_of(facts: Facts) -> list[str]:
    """Times in milliseconds, and each over the unpruned model's; the first is TTFT."""
    del facts
    return [f"{name}{ending}" for ending in ("", RATIO) for name in METRICS]


def labels_of(facts: Facts) -> list[str]:
    """Names of the lines, as plots have them."""
    return list(dict.fromkeys(label_of(row) for cell in facts["cells"] for row in cell["rows"]))


def columns(
    facts: Facts, chosen: Chosen, bold: Bold = "best", digits: int | None = None, source: str = ""
) -> list[Column]:
    """A column a cell, metric and budget, many tokens first.

    Args:
        facts: as `ocvtp.bench.compare.load` gives it.
        chosen: what is shown. bold: see `with_bold`.
        digits: after the decimal point; None for as many as three digits have.
        source: what tells it from other files.
    """
    found = []
    for metric in chosen.of(metrics_of(facts)):
        for cell in facts["cells"]:
            where = f"{cell_name(cell)}, " if len(facts["cells"]) > 1 else ""
            counts = {row["num_keep"] for row in cell["rows"][1:]}
            for count in sorted(counts, key=lambda n: (n is None, -(n or 0))):
                if not chosen.has_budget(count, None):
                    continue
                column = _column(facts, cell, chosen, metric, count, f"{source}{where}", digits)
                if column is not None:
                    alike = partial(_alike, facts, cell, column, metric, count)
                    found.append(with_bold(column, bold, alike))
    return found


def notes(facts: Facts, chosen: Chosen, bold: Bold) -> Iterator[str]:
    """What a reader must know of the columns."""
    where, settings = facts["environment"], facts["settings"]
    for metric in chosen.of(metrics_of(facts)):
        yield (
            f"{_title(metric)}: medians of {settings['repetitions']} rounds of {facts['model']} on"
            f" {where['device']}, {where['dtype']}, {cell_name(facts['cells'][0]).lower()}."
        )
    yield f"Intervals: 95%, from {statistics.RESAMPLES} resamples of blocks of rounds."
    if bold == "best":
        yield "Bold: the best of a column."
    elif bold == "ci":
        yield (
            "Bold: the fastest of a column, and all whose ratio to it within rounds has an interval"
            " with 1 (of runs at other times: whose intervals overlap)."
        )


def _column(
    facts: Facts,
    cell: Facts,
    chosen: Chosen,
    metric: str,
    count: int | None,
    where: str,
    digits: int | None,
) -> Column | None:
    bare = cell["rows"][0]
    labels = chosen.labels(labels_of(facts)) | {label_of(bare)}
    name = _OWN if count is None else str(count)
    here = [row for row in cell["rows"][1:] if row["num_keep"] == count]
    here = [row for row in here if label_of(row) in labels]
    rows = {label_of(row): row for row in [bare, *here]}
    made = {label: _entry(row, metric) for label, row in rows.items()}
    entries = {label: entry for label, entry in made.items() if entry is not None}
    if not entries.keys() - {label_of(bare)}:
        return None
    largest = max(entry.value for entry in entries.values())
    places = 3 if metric.endswith(RATIO) else 0 if largest >= 100 else 1 if largest >= 10 else 2
    return Column(
        group=better(f"{where}{_title(metric)}", lower=True),
        name=name,
        entries=entries,
        rows={
            k: Row(_kind(row, row is bare), _tokens(row, name), row is bare)
            for k, row in rows.items()
        },
        places=places if digits is None else digits,
        lower=True,
    )


def _title(metric: str) -> str:
    name = metric.removesuffix(RATIO)
    title = _TITLES.get(name, name)
    return f"{title} / unpruned" if name != metric else f"{title}, ms"


def _entry(row: Facts, metric: str) -> Entry | None:
    figure = row["figures"].get(metric.removesuffix(RATIO))
    if figure is None:
        return None
    if metric.endswith(RATIO):
        ratio = figure.get("ratio")
        if ratio is None or row["kept"] is None:
            return None
        return Entry(ratio["value"], ratio["low"], ratio["high"])
    return Entry(figure["median"], figure.get("low"), figure.get("high"))


def _kind(row: Facts, is_bare: bool) -> Kind:
    if is_bare:
        return "unpruned"
    if row.get("yours"):
        return "yours"
    return "control" if is_control(row) else "method"


def _tokens(row: Facts, name: str) -> dict[str, float]:
    """What the language model reads, on average over its layers where that falls from one to one.

    Files of earlier versions do not say that: nothing.
    """
    kept = row["kept"]
    if kept is None:
        return {}
    counts = kept.get("visual_tokens_average") if kept["layers"] else kept["visual_tokens_kept"]
    return {name: fmean(counts)} if counts else {}


def _alike(
    facts: Facts, cell: Facts, column: Column, metric: str, count: int | None, label: str, best: str
) -> bool:
    """Whether the ratio of two rows within rounds may be 1."""
    rows = [
        row
        for name in (label, best)
        for row in cell["rows"]
        if (label_of(row), row["num_keep"]) == (name, count)
    ]
    if len(rows) < 2 or any("beside" in row for row in rows):
        return overlap(column.entries[label], column.entries[best])
    name, new_tokens = metric.removesuffix(RATIO), facts["settings"]["new_tokens"]
    own, other = (series(row["samples"], name, new_tokens).tolist() for row in rows)
    if min(own) <= 0 or min(other) <= 0:
        return bool(own == other)
    found = statistics.ratio(own, other, cell["block"])
    return found.low <= 1 <= found.high
