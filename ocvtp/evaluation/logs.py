"""What a run has seen so far: JSON lines for each condition, which a later run continues."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ocvtp.evaluation.tasks.base import Record
from ocvtp.field_types import shown
from ocvtp.reporting.files import named, replacing


class Log:
    """The records of one condition, in the order of the items.

    The first line says what they depend on. A line that was cut off is forgotten.

    Args:
        folder: made where absent.
        key: of the condition.
        settings: JSON, what the records depend on.
        unsaid: JSON, what settings are that nobody named: said aloud they are no others.

    Raises:
        ValueError: if the file there was written under other settings.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        settings: dict[str, Any],
        unsaid: Mapping[str, Any] | None = None,
    ) -> None:
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        words = re.sub(r"[^\w.=%-]+", "_", key)[:80]
        self.path = folder / f"{words}.{digest}.jsonl"
        self.records: list[Record] = []
        header = {"condition": key, **settings}
        if not self.path.is_file():
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(header) + "\n")
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = [self._read(line) for line in whole.split(b"\n")[:-1]]
        here = json.loads(json.dumps({**(unsaid or {}), **header}))
        if other := _differences({**(unsaid or {}), **(lines[0] if lines else {})}, here):
            order = " the checkpoints in the order of that run," if "checkpoint" in other else ""
            raise ValueError(
                f"{self.path} holds answers of {key!r} under other settings"
                f" ({'; '.join(other.values())}); pass{order} another --output, or delete that"
                " file."
            )
        self.records = lines[1:]
        if len(whole) < len(content):
            with replacing(self.path) as temporary:
                temporary.write_bytes(whole)

    def _read(self, line: bytes) -> Record:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(self._damaged(str(error))) from error
        if not isinstance(found, dict):
            raise ValueError(self._damaged(f"{shown(found)} is no record"))
        return found

    def _damaged(self, why: str) -> str:
        return f"{self.path} is damaged ({why}); pass another --output, or delete that file."

    def refuse_more_than(self, count: int) -> None:
        """Refuse a log of more records than there are items.

        Raises:
            ValueError: if two runs wrote to it at once.
        """
        if len(self.records) > count:
            raise ValueError(self._damaged(f"{len(self.records)} records of {count} items"))

    def __len__(self) -> int:
        return len(self.records)

    def append(self, records: Sequence[Record]) -> None:
        """Add records of the next items."""
        with named(self.path), self.path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        self.records += records


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """What differs, in words, by its name."""
    return {
        name: f"{name} was {shown(there.get(name))} and is {shown(here.get(name))}"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    }


def headers(folder: Path) -> Iterator[dict[str, Any]]:
    """What the logs of a folder say of themselves, each with its `condition`."""
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            line = file.readline()
        try:
            header = json.loads(line)
        except ValueError:  # cut off, or no log
            continue
        if isinstance(header, dict) and "condition" in header:
            yield header
