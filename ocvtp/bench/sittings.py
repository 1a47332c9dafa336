"""What a folder holds of a cell: rows are timed side by side in one sitting, others join later.

Rows of a later sitting have an unpruned model of their own beside them, to which their ratios are:
what the machine did in between is in none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ocvtp.bench import summary
from ocvtp.reporting.files import replacing
from ocvtp.reporting.results_files import lack, read_json

Facts = Mapping[str, Any]

CHOICES = ("pruners", "num_keep", "savings", "skip_unfit")
"""Settings that say which rows there are, and nothing about how they are timed."""
_WHAT = "a cell of `ocvtp bench`: delete that file, or another --output"
_SIZES = ("batch_size", "text_length", "images_per_prompt")
_SHAPE = {
    "header": {"pruners": list, "num_keep": list},
    "sizes": dict,
    "unfit": dict,
    "rows": [{"key": str, "label": str, "savings": (dict, type(None)), "samples": dict}, ...],
}


class Sittings:
    """The sittings of one cell, in files of a folder.

    Args:
        folder: of the files. key: of the cell.
        header: what all sittings of the cell must share, but for `CHOICES`.

    Raises:
        ValueError: if a file is of other settings, or cannot be read.
    """

    def __init__(self, folder: Path, key: str, header: Facts) -> None:
        self.key = key
        self._folder, self._header = folder, header
        paths = _paths(folder, key)
        self._next = 1 + max((number for number, _ in paths), default=0)
        self.found = [_read(path, header) for _, path in paths]
        """Raw, see `ocvtp.bench.run`; the first first."""

    def same(self) -> Facts | None:
        """The sitting that had just these settings."""
        return next((found for found in self.found if found["header"] == self._header), None)

    def rows(self) -> dict[str, Facts]:
        """All rows, by their keys."""
        return {row["key"]: row for found in reversed(self.found) for row in found["rows"]}

    def tried(self, skip_unfit: bool) -> set[str]:
        """Keys of what was timed, of what has no effect, and of what cannot run if that is fine."""
        found = set(self.rows())
        for one in self.found:
            found |= set(one.get("without_effect", ()))
            found |= set(one["unfit"]) if skip_unfit else set()
        return found

    def add(self, found: dict[str, Any]) -> None:
        """Write a sitting to its file."""
        found = {"header": self._header, **found}
        name = f"{self.key}.json" if self._next == 1 else f"{self.key}.{self._next}.json"
        with replacing(self._folder / name) as temporary:
            temporary.write_text(json.dumps(found) + "\n")
        self._next += 1
        self.found.append(found)

    def cell(self, new_tokens: int) -> dict[str, Any]:
        """One cell of results.json: rows of a later sitting hold what they were timed beside."""
        whole, *later = (summary.cell(found, new_tokens) for found in self.found)
        known = {row["key"] for row in whole["rows"]}
        for cell in later:
            bare, *rows = cell["rows"]
            beside = {"block": cell["block"], "samples": bare["samples"]}
            beside["ttft"] = bare["figures"]["ttft"]["median"]
            whole["rows"] += [row | {"beside": beside} for row in rows if row["key"] not in known]
            known |= {row["key"] for row in rows}
            whole["unfit"] |= cell["unfit"]
        whole["unfit"] = {k: why for k, why in whole["unfit"].items() if k not in known}
        return whole


def cells_in(folder: Path, header: Facts) -> list[Sittings]:
    """All cells of a folder.

    Args:
        folder: of the files. header: without the sizes of a cell.

    Raises:
        ValueError: see `Sittings`.
    """
    names = dict.fromkeys(path.name.partition(".")[0] for path in sorted(folder.glob("*.json")))
    keys, cells = [name for name in names if _paths(folder, name)], []
    for key in keys:
        own = _load(_paths(folder, key)[0][1])["header"]
        cells.append(Sittings(folder, key, {**header, **{name: own.get(name) for name in _SIZES}}))
    return cells


def chosen(sittings: Iterable[Sittings]) -> dict[str, list[Any]]:
    """The pruners and budgets of all sittings, each once."""
    headers = [found["header"] for one in sittings for found in one.found]
    return {
        name: list(dict.fromkeys(value for header in headers for value in header[name]))
        for name in ("pruners", "num_keep")
    }


def names_of_kept(cells: Sequence[Sittings], asked: Mapping[str, set[str]]) -> list[str]:
    """What earlier runs timed that this one did not ask for.

    Args:
        cells: all of a folder. asked: by key of a cell the keys of its rows.
    """
    names = []
    for cell in cells:
        if cell.key not in asked:
            names.append(f"cell {cell.key}")
        elif rows := [key for key in cell.rows() if key not in asked[cell.key]]:
            names.append(f"{', '.join(rows)} of cell {cell.key}")
    return names


def _paths(folder: Path, key: str) -> list[tuple[int, Path]]:
    """The files of a cell by number: `KEY.json` is the first, `KEY.2.json` the second."""
    found = [(1, folder / f"{key}.json")]
    for path in folder.glob(f"{key}.*.json"):
        number = path.name.removeprefix(f"{key}.").removesuffix(".json")
        found += [(int(number), path)] if number.isdigit() else []
    return sorted((number, path) for number, path in found if path.is_file())


def _load(path: Path) -> dict[str, Any]:
    found = read_json(path, _WHAT)
    if problem := lack(found, _SHAPE):
        raise ValueError(f"{path} is not whole: {problem}; pass {_WHAT}.")
    return dict(found)


def _read(path: Path, header: Facts) -> dict[str, Any]:
    found = _load(path)
    own = found["header"]
    names = sorted({*header, *own} - set(CHOICES))
    if differ := [name for name in names if header.get(name) != own.get(name)]:
        raise ValueError(
            f"{path} was timed under other settings ({', '.join(differ)}); pass another --output,"
            " or delete that file."
        )
    try:
        summary.cell(found, own["new_tokens"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not whole ({type(error).__name__}: {error}); pass {_WHAT}."
        ) from error
    return found
