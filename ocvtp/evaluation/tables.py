"""Tables of an evaluation, in Markdown, from what results.json holds.

A figure is `{value, low, high, n, images, minus_unpruned, minus_random}`, a row a condition; both
are as `ocvtp.evaluation.report.results` makes them. Columns are padded, so that a table can be
read in a terminal too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ocvtp.evaluation.intervals import RESAMPLES
from ocvtp.evaluation.labels import MEANINGS, ORIGINAL
from ocvtp.reporting.markdown_table import table
from ocvtp.reporting.paper_table import is_best
from ocvtp.reporting.plain_text import code, markdown, on_images, one_line

Facts = Mapping[str, Any]

_FEW = 100  # questions below which a table comes with a note

_LEGEND = f"""\
- In brackets: 95% intervals, from {RESAMPLES} resamples of the images (a bootstrap over clusters);
  standard errors clustered by image, as lmms-eval has them, are another estimate of the same.
- Differences are paired: both sides answer the same questions. A star marks an interval without 0.
  Of many pruners that are no better than random, one in twenty earns a star by chance.
- Further figures with their intervals, and p values, are in results.json."""


def full(facts: Facts) -> str:
    """The report: warnings, a table a metric and budget, how to read them, what they depend on."""
    title = markdown(f"{facts['task']} on {facts['model']}")
    parts = [f"# {title}", *map(_warning, facts["warnings"])]
    parts += [f"> Note. {markdown(remark)}" for remark in facts.get("remarks", ())]
    for metric in facts["metrics"]:
        figure = next(row["figures"][metric] for row in facts["rows"] if metric in row["figures"])
        asked = f"{figure['n']} {markdown(facts['counts'])} {on_images(figure['images'])}."
        parts += [f"## {markdown(metric)}", asked]
        for budget in budgets(facts):
            parts += [f"### {_heading(budget)}", _budget_table(facts, metric, budget)]
    parts += hard_questions(facts)
    parts += positions(facts)
    noted = [row for row in facts["rows"] if row["note"]]
    if noted:
        lines = [
            f"- {_name(row)} at {budget_text(row['budget'])}: {markdown(row['note'])}"
            for row in noted
        ]
        parts += ["## Notes", "\n".join(lines)]
    parts += ["## How to read this", _legend(facts), "## Settings and environment", *_origin(facts)]
    return "\n\n".join(parts) + "\n"


def _legend(facts: Facts) -> str:
    """How to read the tables, and what the controls are that occur."""
    labels = {row["label"].removesuffix(ORIGINAL) for row in facts["rows"] if row["control"]}
    there = {label.partition(":")[0] for label in labels}
    said = [f"  - `{name}` {what}" for name, what in MEANINGS.items() if name in there]
    if not said:
        return _LEGEND
    return "\n".join([_LEGEND, "- Controls are there to be compared with:", *said])


def hard_questions(facts: Facts) -> list[str]:
    """What a smaller image fails: a table a metric, a column a budget; none where nobody asked."""
    found, texts = facts.get("where_downsampling_fails") or [], list[str]()
    for metric in dict.fromkeys(part["metric"] for part in found):
        parts = [part for part in found if part["metric"] == metric]
        names = " or ".join(code(by) for by in dict.fromkeys(part["by"] for part in parts))
        counts = ", ".join(f"{part['n']} at {budget_text(part['budget'])}" for part in parts)
        texts += [
            f"## {markdown(metric)}, on the {markdown(facts['counts'])} that {names} fails",
            f"{counts}. They are chosen by the answers of {names} at the same budget, which has"
            " next to nothing here by that choice; chance lifts the others a little.",
        ]
        if (least := min(part["n"] for part in parts)) < _FEW:
            few = f"As few as {least} {markdown(facts['counts'])}: these intervals rank little."
            texts.append(f"> Note. {few}")
        texts.append(_hard_table(parts, facts["percent"]))
    return texts


def positions(facts: Facts) -> list[str]:
    """What original positions are worth: a table a metric, a column a budget; none without both."""
    found, texts = facts.get("original_minus_contiguous") or [], list[str]()
    for metric in dict.fromkeys(part["metric"] for part in found):
        own = {(p["label"], p["budget"]): p for p in found if p["metric"] == metric}
        at = list(dict.fromkeys(budget for _, budget in own))
        cells = [
            [code(label), *(_with_interval(own.get((label, b)), facts["percent"], "+") for b in at)]
            for label in dict.fromkeys(label for label, _ in own)
        ]
        texts += [
            f"## {markdown(metric)}, original positions minus contiguous",
            "Paired; of the same tokens, at the positions that they had in the whole prompt and"
            " numbered from 0.",
            table(["pruner", *map(budget_text, at)], cells),
        ]
    return texts


def short(facts: Facts) -> str:
    """A row a pruner, a column a budget below 1; one table a metric, one blank line between."""
    return "\n".join(_short_table(facts, metric) for metric in facts["metrics"])


def budgets(facts: Facts) -> list[float | None]:
    """All budgets, large to small; None last."""
    found = {row["budget"] for row in facts["rows"]}
    return sorted(found, key=lambda budget: (budget is None, -(budget or 0)))


def pruned_budgets(facts: Facts) -> list[float]:
    """The budgets below 1, large to small."""
    return [budget for budget in budgets(facts) if budget is not None and budget < 1]


def focus(facts: Facts) -> float:
    """The smallest budget but one, where pruners differ and still work; the only one if alone."""
    return pruned_budgets(facts)[-2:][0]


def ranked(facts: Facts, metric: str, budget: float | None) -> list[Facts]:
    """The rows at a budget, best first; those without the figure last."""
    rows = [row for row in facts["rows"] if row["budget"] == budget]
    sign = -1 if metric in facts["lower_is_better"] else 1
    return sorted(rows, key=lambda row: -_value(row, metric, sign))


def budget_text(budget: float | None) -> str:
    """A share of tokens in percent of three digits."""
    return "its own budget" if budget is None else f"{100 * budget:.3g}%"


def estimate_text(figure: Facts | None, percent: bool) -> str:
    """`82.3 (80.9 to 83.6)`; `-` where there is no figure."""
    return _with_interval(figure, percent, sign="")


def difference_text(difference: Facts | None, percent: bool) -> str:
    """`-3.2 (-4.5 to -1.9)`, in points; `-` where there is none."""
    return _with_interval(difference, percent, sign="+")


def number_text(value: float | None, percent: bool, sign: str = "") -> str:
    """Percent to one place, other shares to three."""
    if value is None:
        return "-"
    places = 1 if percent else 3
    return f"{round(100 * value if percent else value, places) + 0.0:{sign}.{places}f}"


def excludes_zero(difference: Facts | None) -> bool:
    """Whether the interval of a difference is on one side of 0."""
    if difference is None or difference["low"] is None:
        return False
    return bool(difference["low"] > 0 or difference["high"] < 0)


def _budget_table(facts: Facts, metric: str, budget: float | None) -> str:
    """One row a condition, best first."""
    rows, percent = ranked(facts, metric, budget), facts["percent"]
    group, others = metric.rpartition("/")[0], []
    for name in dict.fromkeys(name for row in rows for name in row["figures"]):
        if name.rpartition("/")[0] == group and name not in facts["metrics"]:
            others.append(name)
    figures = [row["figures"].get(metric) or {} for row in rows]
    minus = [
        name for name in ("minus_unpruned", "minus_random") if any(f.get(name) for f in figures)
    ]
    head = ["pruner", "tokens", metric.rpartition("/")[2]]
    head += [name.replace("_", " ") for name in minus]
    head += [name.rpartition("/")[2] for name in others]
    cells = []
    for row, figure in zip(rows, figures, strict=True):
        line = [_name(row), _tokens(row["visual_tokens"]), estimate_text(figure, percent)]
        line += [_starred(figure.get(name), percent) for name in minus]
        cells.append(line + [number_text(_get(row, name, "value"), percent) for name in others])
    return table(head, cells)


def _hard_table(parts: Sequence[Facts], percent: bool) -> str:
    """A row a condition, a column a budget; the best at the smallest budget on top."""
    at = {(row["label"], part["budget"]): row for part in parts for row in part["rows"]}
    last = sorted(parts[-1]["rows"], key=lambda row: -(row["value"] or 0))
    labels = dict.fromkeys([*(row["label"] for row in last), *(label for label, _ in at)])
    cells = [
        [code(label)] + [estimate_text(at.get((label, part["budget"])), percent) for part in parts]
        for label in labels
    ]
    return table(["pruner", *(budget_text(part["budget"]) for part in parts)], cells)


def _short_table(facts: Facts, metric: str) -> str:
    """One metric: pruners in the order of the smallest budget but one."""
    columns, percent = pruned_budgets(facts), facts["percent"]
    whole = [
        f"{_name(row)} {_narrow(row, metric, percent)}{_counted(row)}"
        for row in facts["rows"]
        if row["budget"] not in columns and metric in row["figures"]
    ]
    if not columns:
        own = any(row["budget"] is None and row["figures"] for row in facts["rows"])
        said = f"{', '.join(whole)}. ±: half of the 95% interval." if own else "nothing was pruned."
        return f"{metric}: {said}\n"
    at = {(row["label"], row["budget"]): row for row in facts["rows"]}
    order = {row["label"]: row for budget in columns for row in ranked(facts, metric, budget)}
    first = [row["label"] for row in ranked(facts, metric, focus(facts))]
    labels = list(dict.fromkeys([*first, *order]))
    best = {budget: _best(facts, metric, budget) for budget in columns}
    cells = []
    for label in labels:
        rows = [at.get((label, budget)) for budget in columns]
        line = [
            f"**{_narrow(row, metric, percent)}**"
            if row is not None and any(row is one for one in best[row["budget"]])
            else _narrow(row, metric, percent)
            for row in rows
        ]
        cells.append([_name(order[label]), *line])
    better = " Lower is better." if metric in facts["lower_is_better"] else ""
    bold = " Bold: best without training." if any(best.values()) else ""
    legend = f"{', '.join(whole)}.{better} ±: half of the 95% interval.{bold}"
    return f"{table([metric, *map(budget_text, columns)], cells)}\n\n{legend.lstrip('. ')}\n"


def _best(facts: Facts, metric: str, budget: float) -> list[Facts]:
    """Those that are neither controls nor trained and show the best figure: all of a tie.

    None where that is no figure to be best by, see `is_best`.
    """
    rows = [row for row in ranked(facts, metric, budget) if has_figure(row, metric)]
    shown = [number_text(_get(row, metric, "value"), facts["percent"]) for row in rows]
    fair = [
        (row, text)
        for row, text in zip(rows, shown, strict=True)
        if not row["control"] and not row["trained"]
    ]
    if not fair or not is_best(fair[0][1], shown, metric in facts["lower_is_better"]):
        return []
    return [row for row, text in fair if text == fair[0][1]]


def has_figure(row: Facts, metric: str) -> bool:
    """Whether there is a figure, and something counted in it."""
    return _get(row, metric, "value") is not None


def _name(row: Facts) -> str:
    """The label, and what a reader must not overlook."""
    seeds = f"{row['seeds']} seeds" if row["seeds"] > 1 else ""
    kind = "control" if row["control"] else "yours" if row.get("yours") else ""
    marks = ", ".join(filter(None, [kind, seeds]))
    return code(row["label"]) + (f" ({marks})" if marks else "")


def _counted(row: Facts) -> str:
    """` with 64 tokens`, of a pruner with a budget of its own."""
    count = row.get("visual_tokens")
    return "" if row["budget"] is not None or count is None else f" with {_tokens(count)} tokens"


def _heading(budget: float | None) -> str:
    if budget == 1:
        return "All tokens"
    return "Budgets of their own" if budget is None else f"{budget_text(budget)} of the tokens"


def _tokens(count: float | None) -> str:
    return "-" if count is None else f"{count:.1f}".removesuffix(".0")


def _with_interval(figure: Facts | None, percent: bool, sign: str) -> str:
    if figure is None or figure.get("value") is None:
        return "-"
    value, low, high = (number_text(figure[key], percent, sign) for key in ("value", "low", "high"))
    return value if figure["low"] is None else f"{value} ({low} to {high})"


def _starred(difference: Facts | None, percent: bool) -> str:
    star = " *" if excludes_zero(difference) else "  "
    return (difference_text(difference, percent) + star).rstrip()


def _narrow(row: Facts | None, metric: str, percent: bool) -> str:
    """`82.3 ±1.4`: half of the interval's length."""
    figure = None if row is None else row["figures"].get(metric)
    if figure is None or figure["value"] is None:
        return "-"
    value = number_text(figure["value"], percent)
    if figure["low"] is None:
        return value
    return f"{value} ±{number_text((figure['high'] - figure['low']) / 2, percent)}"


def _get(row: Facts, metric: str, key: str) -> Any:
    return row["figures"].get(metric, {}).get(key)


def _value(row: Facts, metric: str, sign: int) -> float:
    value = _get(row, metric, "value")
    return float("-inf") if value is None else sign * float(value)


def _warning(warning: Facts) -> str:
    sign = "**Warning.** " if warning["level"] == "loud" else "Note. "
    return f"> {sign}{markdown(warning['text'])}"


def _origin(facts: Facts) -> Iterator[str]:
    """The command as code, then what else the figures depend on."""
    known = {**facts["settings"], **facts["environment"]}
    if "command" in known:
        yield f"    {one_line(known.pop('command'))}"
    yield "\n".join(
        f"- {markdown(key)}: {markdown(_value_text(value))}" for key, value in known.items()
    )


def _value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
