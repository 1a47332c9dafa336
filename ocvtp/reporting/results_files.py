"""Reading what commands wrote: the files of other versions, and files that are broken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ocvtp.field_types import shown

RESULTS = "results.json"
SCHEMA = 1
_WHAT = "a results.json of `ocvtp evaluate`"
_NUMBER = (int, float)
_OR_NONE = (*_NUMBER, type(None))
_FIGURE = {"value": _OR_NONE, "low": _OR_NONE, "high": _OR_NONE}
_ROW = {
    "label": str,
    "pruner": str,
    "budget": _OR_NONE,
    "num_keep": (int, type(None)),
    "seeds": int,
    "control": bool,
    "note": str,
    "trained": bool,
    "figures": dict,
}
_RESULTS = {
    "schema": int,
    "task": str,
    "model": str,
    "metrics": [str, ...],
    "percent": bool,
    "settings": dict,
    "environment": dict,
    "rows": [_ROW, ...],
}
_VALUES = {
    "task": str,
    "metrics": [str, ...],
    "rows": [{"label": str, "num_keep": (int, type(None)), "figures": dict}],
}
_OLD_NAMES = {"ridge": "unrestored"}
"""Figures that had another name: that one is a pruner's."""


def read_json(path: str | Path, what: str) -> Any:
    """The JSON of a file.

    Args:
        path: of the file. what: to pass in its place, for the message.

    Raises:
        ValueError: if it cannot be read, or is none.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); pass {what}.") from error


def refuse_another(folder: Path, kind: str) -> None:
    """Refuse a folder whose results.json would be written over by that of another command.

    Args:
        folder: of the results. kind: what the `kind` in them must be.

    Raises:
        ValueError: if it is of another kind, or cannot be read.
    """
    path = folder / RESULTS
    if not path.exists():
        return
    found = read_json(path, "another --output, or delete that file")
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise ValueError(
            f"{path} is of another command, and would be written over; pass another --output, or"
            " delete that file."
        )


def lack(value: Any, shape: Any, where: str = "") -> str:
    """What a JSON value lacks of a shape, in words; the empty text where it has it all.

    Args:
        value: as it was read.
        shape: a type, or several of them; a mapping of keys to shapes, further keys being fine;
            `[shape]` of all items of a list, `[shape, ...]` where it may not be empty.
        where: name of the value.
    """
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return f"{where or 'it'} is no object"
        inner = f"{where}." if where else ""
        parts = (
            lack(value[key], part, f"{inner}{key}") if key in value else f"{inner}{key} is missing"
            for key, part in shape.items()
        )
        return next(filter(None, parts), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        if not value and len(shape) > 1:
            return f"{where} is empty"
        parts = (lack(item, shape[0], f"{where}[{n}]") for n, item in enumerate(value))
        return next(filter(None, parts), "")
    right = isinstance(value, shape) and (not isinstance(value, bool) or shape is bool)
    return "" if right else f"{where} is {value!r}"


def read_results(path: str | Path) -> dict[str, Any]:
    """The results.json of `ocvtp evaluate`; figures of older versions by their names of today.

    Raises:
        ValueError: if it is none, or not whole, or of another schema.
    """
    found = _read(path, _RESULTS, _FIGURE)
    if found["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {found['schema']}, this version reads {SCHEMA}; pass {_WHAT} of it."
        )
    return found


def read_values(path: str | Path) -> dict[str, Any]:
    """The same, of which `task`, `metrics`, and the values of rows are needed alone."""
    return _read(path, _VALUES, {"value": _OR_NONE})


def _read(path: str | Path, shape: Mapping[str, Any], figure: Mapping[str, Any]) -> dict[str, Any]:
    found = read_json(path, _WHAT)
    problem = lack(found, shape)
    for number, row in enumerate([] if problem else found["rows"]):
        figures = dict.fromkeys(row["figures"], figure)
        problem = problem or lack(row["figures"], figures, f"rows[{number}].figures")
    problem = problem or _without_a_figure(found)
    if problem:
        raise ValueError(f"{path} is not whole: {problem}; pass {_WHAT}.")
    return _renamed(found)


def _without_a_figure(found: Mapping[str, Any]) -> str:
    known = {name for row in found["rows"] for name in row["figures"]}
    missing = [name for name in found["metrics"] if name not in known]
    return f"no row has a figure {shown(missing[0])}" if missing and known else ""


def current_names(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by their names of today."""
    return {_OLD_NAMES.get(name, name): value for name, value in figures.items()}


def _renamed(found: dict[str, Any]) -> dict[str, Any]:
    rows = [{**row, "figures": current_names(row["figures"])} for row in found["rows"]]
    lists = {key: _names(found.get(key, [])) for key in ("metrics", "lower_is_better")}
    return {**found, **lists, "rows": rows}


def _names(names: Sequence[str]) -> list[str]:
    return [_OLD_NAMES.get(name, name) for name in names]
