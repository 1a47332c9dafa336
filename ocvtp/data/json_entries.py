"""Files of JSON objects: a JSON list of them, or one a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One JSON object of a file; `where` names it in messages, `number` counts from 1."""

    where: str
    content: dict[str, Any]
    number: int

    def text(self, key: str) -> str:
        """The text under a key.

        Raises:
            ValueError: if there is none.
        """
        if key not in self.content:
            found = ", ".join(self.content) or "nothing"
            raise ValueError(f"{self.where} lacks {key!r} (it has {found}); add it.")
        value = self.content[key]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where} has {value!r} as {key!r}; pass a text in quotes.")
        return value


def read_entries(path: str | Path, faults: list[str] | None = None) -> list[Entry]:
    """The JSON objects of a file: a JSON list of them, or one a line.

    Args:
        path: of the file.
        faults: takes what is wrong with single ones, which are left out; None raises it.

    Raises:
        ValueError: if the file is missing, or is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"question file {path} does not exist; pass a JSON list or JSON lines.")
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            numbered = [("entry", n, value) for n, value in enumerate(json.loads(text), 1)]
        else:
            numbered = list(_lines(text, faults))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"question file {path} is neither a JSON list nor JSON lines ({error})."
        ) from error
    entries = []
    for kind, number, value in numbered:
        where = f"{kind} {number} of {path}"
        if isinstance(value, dict):
            entries.append(Entry(where, value, number))
        elif faults is None:
            raise ValueError(f"{where} is {value!r}; pass a JSON object.")
        else:
            faults.append(f"{where} is {value!r}; pass a JSON object.")
    return entries


def _lines(text: str, faults: list[str] | None) -> Iterable[tuple[str, int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if faults is None:
                    raise ValueError(f"line {number}: {error}") from error
                faults.append(f"line {number}: {error}")
            else:
                yield "line", number, value
