"""Two evaluations of one task and model as one, e.g. of two machines.

Where both hold the scores of all items, all figures, intervals and paired differences are made
again from them, so that every row is compared with the same ones. Figures of files without are
taken over, and differences only where they are to a row that is still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any

from ocvtp.choices import Preferred
from ocvtp.evaluation.earlier_runs import Key, keys_of, names_of
from ocvtp.evaluation.labels import RANDOM, UNPRUNED
from ocvtp.evaluation.report import Report, Row, results
from ocvtp.evaluation.scores import unpacked
from ocvtp.evaluation.tasks.base import Ratio
from ocvtp.reporting.results_files import SCHEMA

Facts = Mapping[str, Any]
_OF_TASK = ("task", "metrics", "percent", "lower_is_better", "counts")
_WEIGHTS = ("model_weights", "tower_weights")
_APART = {"task", "command", "earlier_commands", "seeds", "checkpoints"}
_DIFFERENCES = {"minus_unpruned": UNPRUNED, "minus_random": RANDOM}


@dataclass(frozen=True, eq=False)
class _Side:
    """One file, and its rows by label and budget."""

    name: str
    facts: Facts
    scores: Sequence[Mapping[str, Ratio]] | None

    @property
    def rows(self) -> dict[Key, Facts]:
        return {(row["label"], row["budget"]): row for row in self.facts["rows"]}

    @property
    def ratios(self) -> dict[Key, Mapping[str, Ratio]]:
        return dict(zip(self.rows, self.scores or (), strict=bool(self.scores)))

    @property
    def answers(self) -> Facts:
        found: Facts = self.facts.get("answers") or {}
        return found


def merge(
    a: Facts,
    b: Facts,
    names: tuple[str, str] = ("the first", "the second"),
    prefer: Preferred | None = None,
    command: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of both.

    Args:
        a, b: as `read_results` gives them.
        names: of the files, for messages and remarks.
        prefer: whose rows to take where they differ; None refuses them.
        command: what to type for the same.

    Returns:
        what `results` would return, and the raw answers. What differs in the settings and the
        environment is among the remarks.

    Raises:
        ValueError: if they are of other tasks, questions or models, or rows differ.
    """
    sides = [
        _Side(name, facts, unpacked(facts, name)) for name, facts in zip(names, (a, b), strict=True)
    ]
    remarks = [*_same_task(*sides), *_same_model(*sides)]
    chosen = _chosen(sides, prefer, remarks)
    taken = [key for key, side in chosen.items() if side is sides[1]]
    if taken:
        remarks.append(f"from {sides[1].name}: {names_of(taken)}.")
    remarks += _others(sides)
    kept = [one for side in sides for one in side.facts.get("remarks", ())]
    facts = {
        "model": a["model"],
        "settings": _settings(sides, command),
        "environment": _both(a["environment"], b["environment"]),
        "remarks": list(dict.fromkeys([*remarks, *kept])),
    }
    if all(side.scores is not None for side in sides):
        found = results(_report(facts, chosen, a))
    else:
        found = _spliced(facts, chosen, sides)
    return found, _answers(sides, chosen)


def _same_task(a: _Side, b: _Side) -> Iterator[str]:
    for name in _OF_TASK:
        _check(name, a, b, a.facts.get(name), b.facts.get(name))
    items = [side.answers.get("items") or [] for side in (a, b)]
    if all(items) and items[0] != items[1]:
        pairs = zip(*items, strict=False)
        first = next((str(x["key"]) for x, y in pairs if x != y), "the last ones")
        raise ValueError(
            f"{a.name} and {b.name} are of other questions ({len(items[0])} and {len(items[1])};"
            f" they first differ at {first}); merge evaluations of the same."
        )
    own, other = (side.facts["settings"].get("task") or {} for side in (a, b))
    for name in sorted(own.keys() | other.keys()):
        pair = own.get(name), other.get(name)
        if pair[0] == pair[1]:
            continue
        if not (all(items) and _last_parts(pair[0]) == _last_parts(pair[1]) is not None):
            _check(f"the task's {name}", a, b, *pair)
        yield f"{name} of the task: {pair[0]} in {a.name}, {pair[1]} in {b.name}."


def _last_parts(value: Any) -> list[str] | None:
    """Names of files and folders without where they are; None where it is something else."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) and "/" in one for one in values):
        return None
    return [PurePath(one).name for one in values]


def _same_model(a: _Side, b: _Side) -> Iterator[str]:
    names = [side.facts["model"] for side in (a, b)]
    weights = [
        next(
            (side.facts["settings"][key] for key in _WEIGHTS if key in side.facts["settings"]), None
        )
        for side in (a, b)
    ]
    if None not in weights:
        _check("the model's weights", a, b, *weights)
    else:
        _check("model", a, b, *names)
        silent = " and ".join(s.name for s, known in zip((a, b), weights, strict=True) if not known)
        yield f"whether the weights of the model are the same is not known: {silent} does not say."
    if names[0] != names[1]:
        yield f"model: {names[0]} in {a.name}, {names[1]} in {b.name}; its weights are the same."


def _check(what: str, a: _Side, b: _Side, own: Any, other: Any) -> None:
    if own != other:
        raise ValueError(
            f"{what} is {own!r} in {a.name} and {other!r} in {b.name}, so that their rows cannot be"
            " compared; merge evaluations of one task and model."
        )


def _chosen(
    sides: Sequence[_Side], prefer: Preferred | None, remarks: list[str]
) -> dict[Key, _Side]:
    """Whose row stands for each label and budget."""
    first, second = sides
    chosen = dict.fromkeys(first.rows, first)
    clashes = []
    for key, row in second.rows.items():
        other = first.rows.get(key)
        if other is None or (row["figures"] and not other["figures"]):
            chosen[key] = second
        elif row["figures"] and not _alike(key, first, second):
            clashes.append(key)
    if clashes and prefer is None:
        raise ValueError(
            f"these rows differ in {first.name} and {second.name}: {names_of(clashes)}; pass"
            " --prefer first or --prefer second to say whose to take, or run one of the two again."
        )
    if clashes:
        side = first if prefer == "first" else second
        chosen |= dict.fromkeys(clashes, side)
        remarks.append(f"rows that differ, taken from {side.name}: {names_of(clashes)}.")
    return chosen


def _alike(key: Key, a: _Side, b: _Side) -> bool:
    """Whether two rows have the same figures, without what they are compared with."""

    def plain(side: _Side) -> Any:
        figures = side.rows[key]["figures"].items()
        shown = {
            name: {k: v for k, v in figure.items() if k not in _DIFFERENCES}
            for name, figure in figures
        }
        return shown, side.rows[key]["seeds"]

    return bool(plain(a) == plain(b))


def _others(sides: Sequence[_Side]) -> Iterator[str]:
    """What else differs, by name."""
    a, b = sides
    for part in ("settings", "environment"):
        own, other = a.facts[part], b.facts[part]
        for name in sorted((own.keys() | other.keys()) - _APART - set(_WEIGHTS)):
            if own.get(name) != other.get(name):
                yield f"{name}: {own.get(name)} in {a.name}, {other.get(name)} in {b.name}."
    if a.facts["settings"].get("seeds") != b.facts["settings"].get("seeds"):
        pair = [side.facts["settings"].get("seeds") for side in sides]
        yield f"seeds of what is random: {pair[0]} in {a.name}, {pair[1]} in {b.name}."


def _settings(sides: Sequence[_Side], command: str | None) -> dict[str, Any]:
    a, b = (side.facts["settings"] for side in sides)
    shared = {name: value for name, value in _both(a, b).items() if name not in _APART}
    lists = {
        name: list(dict.fromkeys([*a.get(name, ()), *b.get(name, ())]))
        for name in ("seeds", "checkpoints")
    }
    typed = [
        one for own in (a, b) for one in (own.get("command"), *own.get("earlier_commands", ()))
    ]
    typed = [one for one in dict.fromkeys(typed) if one and one != command]
    last = {} if command is None else {"command": command}
    return {"task": a.get("task"), **shared, **lists, **last, "earlier_commands": typed}


def _both(a: Facts, b: Facts) -> dict[str, Any]:
    """Values that are the same; of others both, one after the other."""
    found = {}
    for name in dict.fromkeys([*a, *b]):
        pair = [own[name] for own in (a, b) if name in own]
        found[name] = pair[0] if pair[0] == pair[-1] else f"{pair[0]}; {pair[1]}"
    return found


def _report(facts: Facts, chosen: Mapping[Key, _Side], a: Facts) -> Report:
    """The report of all rows, from their scores."""
    names = [field.name for field in fields(Row) if field.name != "figures"]
    rows = [
        Row(
            **{name: side.rows[key][name] for name in names if name in side.rows[key]},
            figures=side.ratios[key],
        )
        for key, side in chosen.items()
    ]
    return Report(
        rows=rows,
        **{name: a[name] for name in _OF_TASK},
        not_judged=a.get("not_judged", ()),
        asks=a.get("asks", True),
        **facts,
    )


def _spliced(facts: Facts, chosen: Mapping[Key, _Side], sides: Sequence[_Side]) -> dict[str, Any]:
    """The figures as they are, without differences to rows that are not there."""
    rows, lost = [], []
    for key, side in chosen.items():
        row, figures = side.rows[key], dict(side.rows[key]["figures"])
        for minus, label in _DIFFERENCES.items():
            other = (label, 1.0 if label == UNPRUNED else row["budget"])
            same = chosen.get(other) is side or (
                all(other in one.rows for one in sides) and _alike(other, *sides)
            )
            if not same and any(figure.get(minus) for figure in figures.values()):
                figures = {name: {**figure, minus: None} for name, figure in figures.items()}
                lost.append(key)
        rows.append({**row, "figures": figures})
    silent = " and ".join(side.name for side in sides if side.scores is None)
    remarks = [
        *facts["remarks"],
        f"{silent} holds no scores of items, so that differences are those of each file.",
    ]
    if lost:
        remarks.append(f"without differences to rows that were not taken: {names_of(lost)}.")
    a = sides[0].facts
    warnings = [one for side in sides for one in side.facts.get("warnings", ())]
    return {
        "schema": SCHEMA,
        **{name: a[name] for name in _OF_TASK if name in a},
        "counts": a.get("counts", "questions"),
        **facts,
        "rows": rows,
        "remarks": remarks,
        "warnings": [one for n, one in enumerate(warnings) if one not in warnings[:n]],
    }


def _answers(sides: Sequence[_Side], chosen: Mapping[Key, _Side]) -> dict[str, Any]:
    """What was said under the conditions of the rows."""
    items: Any = next((one for s in sides if (one := s.answers.get("items"))), [])
    conditions: dict[str, Any] = {}
    for key, side in chosen.items():
        known = side.answers.get("conditions") or {}
        conditions |= {name: known[name] for name in keys_of(side.rows[key], known)}
    return {"items": items, "conditions": conditions}
