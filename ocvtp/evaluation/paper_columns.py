"""Columns of a paper's table from an evaluation's results.json: a metric at a budget each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from ocvtp.choices import Bold
from ocvtp.evaluation.intervals import RESAMPLES, difference
from ocvtp.evaluation.labels import SHUFFLED, UNPRUNED
from ocvtp.evaluation.tables import Facts, budget_text, budgets, has_figure
from ocvtp.evaluation.tasks.base import Ratio
from ocvtp.reporting.chosen import Chosen
from ocvtp.reporting.paper_table import Column, Entry, Kind, Row, overlap, with_bold
from ocvtp.reporting.plain_text import better, on_images

_WHOLE = (UNPRUNED, SHUFFLED)
Scores = Mapping[tuple[str, float | None], Mapping[str, Ratio]]
"""Of every label and budget, by figure."""


def metrics_of(facts: Facts) -> list[str]:
    """Those that reports show first, then all other figures."""
    others = (name for row in facts["rows"] for name in row["figures"])
    return list(dict.fromkeys([*facts["metrics"], *others]))


def columns(
    facts: Facts,
    scores: Sequence[Mapping[str, Ratio]] | None,
    chosen: Chosen,
    bold: Bold = "best",
    digits: int | None = None,
    source: str = "",
) -> list[Column]:
    """A column a metric and budget, many tokens first.

    Args:
        facts: as `read_results` gives it. scores: see `unpacked`.
        chosen: what is shown. bold: see `with_bold`.
        digits: after the decimal point; None for 1 of percent, 3 of other shares.
        source: what tells it from other files.
    """
    by_place: Scores = {}
    if scores is not None:
        keys = [(row["label"], row["budget"]) for row in facts["rows"]]
        by_place = dict(zip(keys, scores, strict=True))
    found = []
    for metric in chosen.of(metrics_of(facts)):
        for budget in budgets(facts):
            column = _column(facts, chosen, metric, budget, digits, source)
            if column is not None:
                alike = partial(_alike, column, by_place, metric, budget)
                found.append(with_bold(column, bold, alike))
    return found


def notes(facts: Facts, scores: object, chosen: Chosen, bold: Bold) -> Iterator[str]:
    """What a reader must know of the columns."""
    for metric in chosen.of(metrics_of(facts)):
        rows = [row for row in facts["rows"] if metric in row["figures"]]
        figure = rows[0]["figures"][metric]
        yield (
            f"{metric} of {facts['task']} on {facts['model']}: {figure['n']}"
            f" {facts.get('counts', 'questions')} {on_images(figure['images'])}."
        )
    seeds = {row["seeds"] for row in facts["rows"]} - {1}
    if seeds:
        yield f"Rows of {' or '.join(map(str, sorted(seeds)))} seeds are means over them."
    yield f"Intervals: 95%, from {RESAMPLES} resamples of the images."
    if bold == "best":
        yield "Bold: the best of a column."
    elif bold == "ci" and scores is not None:
        yield (
            "Bold: the best of a column, and all whose paired difference to it has an interval with"
            " 0."
        )
    elif bold == "ci":
        yield (
            "Bold: the best of a column, and all whose interval overlaps with its interval (the"
            " file holds no scores of items, so differences are not paired)."
        )


def _column(
    facts: Facts,
    chosen: Chosen,
    metric: str,
    budget: float | None,
    digits: int | None,
    source: str,
) -> Column | None:
    """None where nothing of it is to be shown."""
    known = [row for row in facts["rows"] if row["label"] not in _WHOLE]
    labels = chosen.labels(row["label"] for row in facts["rows"]) | {UNPRUNED}
    here = [row for row in known if row["budget"] == budget and row["label"] in labels]
    here = [row for row in here if chosen.has_budget(row["num_keep"], budget)]
    whole = [row for row in facts["rows"] if row["label"] in _WHOLE and row["label"] in labels]
    shown = {row["label"]: row for row in [*whole, *here] if has_figure(row, metric)}
    if not any(row["label"] in shown for row in here):
        return None
    figures = {label: row["figures"][metric] for label, row in shown.items()}
    name = _name(here, budget)
    percent = facts["percent"]
    unit = f"{metric}, %" if percent else metric
    return Column(
        group=better(f"{source}{unit}", metric in facts["lower_is_better"]),
        name=name,
        entries={k: Entry(f["value"], f["low"], f["high"]) for k, f in figures.items()},
        rows={label: _row(row, name) for label, row in shown.items()},
        places=digits if digits is not None else 1 if percent else 3,
        scale=100.0 if percent else 1.0,
        lower=metric in facts["lower_is_better"],
    )


def _name(rows: Sequence[Facts], budget: float | None) -> str:
    """Tokens where all rows count them, else their share."""
    counts = {row["num_keep"] for row in rows}
    return str(counts.pop()) if len(counts) == 1 and None not in counts else budget_text(budget)


def _kind(row: Facts) -> Kind:
    if row["label"] == UNPRUNED:
        return "unpruned"
    return "control" if row["control"] else "yours" if row.get("yours") else "method"


def _row(row: Facts, name: str) -> Row:
    if row["label"] in _WHOLE:
        return Row(_kind(row), whole=True)
    kept = row.get("visual_tokens")
    return Row(_kind(row), {} if kept is None else {name: kept})


def _alike(
    column: Column, scores: Scores, metric: str, budget: float | None, label: str, best: str
) -> bool:
    """Whether the paired difference may be 0; without scores, whether the intervals overlap."""
    pair = [scores.get((one, budget), {}).get(metric) for one in (best, label)]
    if pair[0] is None or pair[1] is None:
        return overlap(column.entries[best], column.entries[label])
    found = difference(pair[0], pair[1])
    return not (found.low > 0 or found.high < 0)
