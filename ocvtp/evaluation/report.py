"""What an evaluation found, as figures with intervals: results.json, report.md and plots.

`results` does the sums once; tables and plots are made from what it returns, so that they can be
made again from a results.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ocvtp.evaluation import plots, tables
from ocvtp.evaluation.by_positions import by_positions
from ocvtp.evaluation.hard_questions import hard_questions
from ocvtp.evaluation.intervals import Difference, difference, estimate
from ocvtp.evaluation.labels import ORACLE, ORIGINAL, RANDOM, SHUFFLED, UNPRUNED
from ocvtp.evaluation.scores import SCORES, packed
from ocvtp.evaluation.tasks.base import Ratio
from ocvtp.reporting.figure_files import save_figure
from ocvtp.reporting.files import replacing
from ocvtp.reporting.results_files import RESULTS as RESULTS
from ocvtp.reporting.results_files import SCHEMA

ENOUGH = 300
"""Questions below which a figure comes with a warning."""
DIGITS = 6


@dataclass(frozen=True, eq=False)
class Row:
    """One condition: a pruner, with its options, at a budget.

    Args:
        label: the pruner as it was asked for, e.g. `fopru:strategy=row`. `unpruned`, `random`,
            `shuffled` and `oracle` are compared with.
        pruner: name in the registry, or of the control.
        budget: share of the visual tokens kept, 1.0 without a pruner; None where the pruner has a
            budget of its own.
        num_keep: tokens kept per image; None as for `budget`.
        seeds: how many the figures are the mean of.
        control: whether it is there to be compared with.
        visual_tokens: kept, mean per image; None where they were not counted.
        figures: by name; without the report's metrics where the condition could not be run.
        note: what a reader must know, e.g. why it could not be run.
        trained: whether it learned from data; the best of the others is set off.
        yours: whether it is a method of the user's own.
    """

    label: str
    pruner: str
    budget: float | None
    num_keep: int | None
    seeds: int
    control: bool
    visual_tokens: float | None
    figures: Mapping[str, Ratio]
    note: str = ""
    trained: bool = False
    yours: bool = False


@dataclass(frozen=True, eq=False)
class Report:
    """All conditions of one task on one model.

    Args:
        task, model: their names.
        metrics: names of the figures that tables and plots show, a table each.
        percent: whether figures are shown in percent.
        settings: of the task, JSON. environment: what else the figures depend on, JSON. A
            `command` in either is shown as one.
        rows: no two of a label at a budget.
        lower_is_better: which of the metrics are errors.
        not_judged: metrics by which the oracle need not win.
        counts: what items are called.
        remarks: what a reader must know of the rows.
        asks: whether items are questions with right answers, see `hard_questions`.

    Raises:
        ValueError: if there is no metric, no row has one of them, or rows double.
    """

    task: str
    model: str
    metrics: Sequence[str]
    percent: bool
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: Sequence[Row] = field(default_factory=tuple)
    lower_is_better: Sequence[str] = ()
    not_judged: Sequence[str] = ()
    counts: str = "questions"
    remarks: Sequence[str] = ()
    asks: bool = True

    def __post_init__(self) -> None:
        known = sorted({name for row in self.rows for name in row.figures})
        absent = [metric for metric in self.metrics if metric not in known]
        if absent or not self.metrics:
            raise ValueError(
                f"metrics={list(self.metrics)}; pass at least one, each of {', '.join(known)}."
            )
        keys = [(row.label, row.budget) for row in self.rows]
        twice = [
            f"{label} at {budget}" for label, budget in set(keys) if keys.count((label, budget)) > 1
        ]
        if twice:
            raise ValueError(
                f"{', '.join(sorted(twice))} is there twice; average seeds into one row."
            )


@lru_cache(maxsize=1)
def results(report: Report) -> dict[str, Any]:
    """All figures with their intervals, what to be warned of, and each item's scores, as JSON.

    Figures of `unpruned`, and of `random` at the same budget, are subtracted, paired. The sums take
    seconds and are done once a report: leave what is returned as it is.
    """
    unpruned = next((row for row in report.rows if row.label == UNPRUNED), None)
    random = {row.budget: row for row in report.rows if row.label == RANDOM}
    rows = [_row(row, unpruned, random.get(row.budget)) for row in report.rows]
    ratios = [(row.label, row.budget, row.figures) for row in report.rows if report.asks]
    facts = {
        "schema": SCHEMA,
        "task": report.task,
        "model": report.model,
        "metrics": list(report.metrics),
        "percent": report.percent,
        "lower_is_better": list(report.lower_is_better),
        "not_judged": list(report.not_judged),
        "counts": report.counts,
        "asks": report.asks,
        "settings": dict(report.settings),
        "environment": dict(report.environment),
        "rows": rows,
        "where_downsampling_fails": hard_questions(ratios, report.metrics),
        "remarks": list(report.remarks),
        "warnings": [text for metric in report.metrics for text in _warnings(report, metric)],
        SCORES: packed([row.figures for row in report.rows], [row.seeds for row in report.rows]),
    }
    if positions := by_positions(ratios, report.metrics):
        facts["original_minus_contiguous"] = positions
    plain: dict[str, Any] = _plain(facts)
    return plain


def to_markdown(report: Report) -> str:
    """The report: warnings, a table a metric and budget, how to read them, what they depend on."""
    return tables.full(results(report))


def short_table(report: Report) -> str:
    """A row a pruner, a column a budget, in Markdown; one table a metric."""
    return tables.short(results(report))


def write(report: Report, folder: Path, answers: Mapping[str, Any]) -> list[Path]:
    """Write results.json, report.md, accuracy.png and differences.png, each whole or not at all.

    Args:
        folder: made where absent; files of these names are replaced.
        answers: raw, JSON: `{"items": [...], "conditions": {"LABEL@BUDGET": [...]}}`.

    Returns:
        What was written: no accuracy.png without a budget below 1, no differences.png without
        `random` beside another row there.
    """
    return write_facts(results(report), folder, answers)


def write_facts(found: Mapping[str, Any], folder: Path, answers: Mapping[str, Any]) -> list[Path]:
    """The same, of what `results` returned."""
    paths = [folder / RESULTS, folder / "report.md"]
    texts = [_lines({**found, "answers": _plain(answers)}) + "\n", tables.full(found)]
    for path, text in zip(paths, texts, strict=True):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for name, drawing in (
        ("accuracy", plots.accuracy(found)),
        ("differences", plots.differences(found)),
    ):
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier run
        if drawing is not None:
            paths.append(save_figure(drawing, path, dpi=120))
    return paths


def _row(row: Row, unpruned: Row | None, random: Row | None) -> dict[str, Any]:
    facts = {name: value for name, value in vars(row).items() if name != "figures"}
    return facts | {"figures": {name: _figure(row, name, unpruned, random) for name in row.figures}}


def _figure(row: Row, name: str, unpruned: Row | None, random: Row | None) -> dict[str, Any]:
    return asdict(estimate(row.figures[name])) | {
        "minus_unpruned": _minus(row, unpruned, name),
        "minus_random": _minus(row, random, name),
    }


def _minus(row: Row, other: Row | None, name: str) -> dict[str, Any] | None:
    """The paired difference; None to itself, or where the other has no such figure."""
    if other is None or other is row or name not in other.figures:
        return None
    return asdict(difference(row.figures[name], other.figures[name]))


def _warnings(report: Report, metric: str) -> Iterator[dict[str, str]]:
    """What makes a metric's figures doubtful: `level`, loud or mild, and `text`."""
    rows = [row for row in report.rows if metric in row.figures]
    n = len(rows[0].figures[metric].hits)
    if n < ENOUGH:
        yield _warn(
            "mild", f"{metric}: only {n} {report.counts}; the intervals are wide and rank little."
        )
    if metric not in report.lower_is_better and (zero := _all_zero(report, metric, rows)):
        yield zero
        if zero["level"] == "loud":
            return

    def show(lead: Difference) -> str:
        return tables.difference_text(_plain(asdict(lead)), report.percent)

    by_label = {row.label: row for row in rows}
    judged = metric not in report.not_judged
    if judged and UNPRUNED in by_label and SHUFFLED in by_label:
        pair = [by_label[label].figures[metric] for label in (UNPRUNED, SHUFFLED)]
        lead = difference(*pair)
        if not lead.low > 0:
            yield _not_needed(metric, lead, show)
    for oracle in rows:
        if oracle.label in (ORACLE, ORACLE + ORIGINAL) and judged:
            yield from _oracle_warning(oracle, rows, metric, show)


def _not_needed(metric: str, lead: Difference, show: Callable[[Difference], str]) -> dict[str, str]:
    """A warning where right images are not clearly better than wrong ones, or there are none."""
    if math.isnan(lead.low) and not math.isnan(lead.value):
        return _warn(
            "mild",
            f"{metric}: there is one image, and no wrong one to ask about. It has no intervals, and"
            " nothing says whether the model needs it; ask about several.",
        )
    return _warn(
        "loud",
        f"{metric}: unpruned minus shuffled images is {show(lead)}. The model does not clearly"
        " need the image, so these figures say nothing about pruners.",
    )


def _all_zero(report: Report, metric: str, rows: Sequence[Row]) -> dict[str, str] | None:
    """A warning where every figure is 0, or every one at a budget."""
    by_budget: dict[float | None, set[bool]] = {}
    for row in rows:
        if not math.isnan(value := row.figures[metric].value):
            by_budget.setdefault(row.budget, set()).add(value == 0)
    zero = [budget for budget, are_zero in by_budget.items() if are_zero == {True}]
    if not zero:
        return None
    if len(zero) == len(by_budget):
        return _warn(
            "loud",
            f"{metric}: every figure is 0. No answer counts here, be it wrong or in a form that"
            " cannot be read, so these figures say nothing about pruners: look at the answers in"
            " results.json.",
        )
    at = ", ".join(map(tables.budget_text, sorted(zero, key=lambda budget: -(budget or 0))))
    return _warn("mild", f"{metric} at {at}: every figure is 0, so that nothing is ranked there.")


_BEATEN = "Something is wrong with the oracle, the task or the model: do not trust these figures."
_BEATEN_BY_TRAINED = (
    "The oracle keeps all objects and knows no question; that pruner was trained, and may know"
    " more."
)


def _oracle_warning(
    oracle: Row, rows: Sequence[Row], metric: str, show: Callable[[Difference], str]
) -> Iterator[dict[str, str]]:
    """A warning where it does not win at its budget and positions, trained pruners apart."""
    apart, original = (UNPRUNED, SHUFFLED, oracle.label), oracle.label.endswith(ORIGINAL)
    rivals = [
        row
        for row in rows
        if row.budget == oracle.budget and row.label not in apart
        if row.label.endswith(ORIGINAL) == original
        if not math.isnan(row.figures[metric].value)
    ]
    for trained in (False, True):
        group = [row for row in rivals if row.trained == trained]
        if not group:
            continue
        best = max(group, key=lambda row: row.figures[metric].value)
        lead = difference(oracle.figures[metric], best.figures[metric])
        if not lead.value < 0:
            continue
        beyond = lead.high < 0
        judged = "The interval holds 0, so this may be chance."
        if beyond:
            judged = _BEATEN_BY_TRAINED if trained else _BEATEN
        text = (
            f"{metric} at {tables.budget_text(oracle.budget)}: the oracle does not win. "
            f"Oracle minus {best.label} is {show(lead)}. {judged}"
        )
        yield _warn("loud" if beyond and not trained else "mild", text)


def _warn(level: str, text: str) -> dict[str, str]:
    return {"level": level, "text": text}


def _plain(value: Any) -> Any:
    """JSON's own kinds: floats of six digits, None for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _lines(value: Any, depth: int = 3, indent: str = "") -> str:
    """JSON with a line for each figure, item and condition's answers: files can be compared."""
    text = partial(json.dumps, allow_nan=False, ensure_ascii=False)
    if not depth or not value or not isinstance(value, dict | list):
        return text(value)
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{text(key)}: {_lines(part, depth - 1, inner)}" for key, part in value.items()]
    else:
        parts = [_lines(part, depth - 1, inner) for part in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{end}"
