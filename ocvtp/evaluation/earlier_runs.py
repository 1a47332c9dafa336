"""Rows of earlier runs in a folder, which a later run of the same task does not ask for again.

What results.json lists is made again from the stored answers, so that all rows are compared with
the same ones, whichever run asked them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ocvtp.evaluation.conditions import Budget
from ocvtp.evaluation.intervals import average
from ocvtp.evaluation.logs import Log, headers
from ocvtp.evaluation.report import RESULTS, Row
from ocvtp.evaluation.tables import budget_text
from ocvtp.evaluation.tasks.base import Record, Task
from ocvtp.reporting.plain_text import code
from ocvtp.reporting.results_files import read_results

Key = tuple[str, float | None]
"""Label and budget of a row."""


@dataclass(frozen=True, eq=False)
class Earlier:
    """What an earlier run left.

    Args:
        rows: that are kept. records: of their conditions, by key.
        lost: rows whose answers are gone, or are of other settings.
        typed: the commands that made the rows.
    """

    rows: list[Row] = field(default_factory=list)
    records: dict[str, list[Record]] = field(default_factory=dict)
    lost: list[Key] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)

    def joined(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of a run and those that are kept, also of what cannot be run this time."""
        kept = {_key(row) for row in self.rows}
        return [*(row for row in rows if _key(row) not in kept), *self.rows]

    def commands(self, last: str | None) -> dict[str, Any]:
        """What was typed for the rows, the last `command` apart."""
        earlier = [one for one in self.typed if one != last]
        return {k: v for k, v in (("command", last), ("earlier_commands", earlier)) if v}

    def remarks(self) -> list[str]:
        """What a reader must know of them."""
        found = []
        if self.rows:
            names = names_of(map(_key, self.rows))
            found.append(f"kept from earlier runs in this folder: {names}.")
        if self.lost:
            names = names_of(self.lost)
            found.append(f"not kept, as their answers are gone or of other settings: {names}.")
        return found


def read(folder: Path) -> dict[str, Any] | None:
    """The results of an earlier run; None without one.

    Raises:
        ValueError: if they cannot be read: they would be written over.
    """
    path = folder / RESULTS
    if not path.exists():
        return None
    try:
        return read_results(path)
    except ValueError as error:
        raise ValueError(
            f"{error} What this folder holds would be lost: pass another --output, or delete that"
            " file."
        ) from error


def kept(
    found: Mapping[str, Any] | None,
    task: Task,
    answers: Path,
    shared: Mapping[str, Any],
    rows: Sequence[Row],
    unpruned: Sequence[Record],
) -> Earlier:
    """The rows of an earlier run of which this one has no figures.

    Args:
        found: as `read` gives it.
        task: what is asked.
        answers: folder of the logs.
        shared: the settings that all conditions of a run share.
        rows: of this run. unpruned: its records of the unpruned model.
    """
    if found is None:
        return Earlier()
    earlier, asked = Earlier(), {_key(row) for row in rows if row.figures}
    logs = dict(_logs(answers, shared))
    for row in found["rows"]:
        if (row["label"], row["budget"]) in asked:
            continue
        keys = keys_of(row, logs)[: row["seeds"]]
        records = {key: Log(answers, key, logs[key]).records for key in keys}
        records = {key: some for key, some in records.items() if len(some) == len(task.items)}
        if row["figures"] and not records:
            earlier.lost.append((row["label"], row["budget"]))
            continue
        earlier.rows.append(_row(row, task, records, unpruned))
        earlier.records.update(records)
    settings = found["settings"]
    if earlier.rows:
        known = [*settings.get("earlier_commands", []), settings.get("command")]
        earlier.typed.extend(dict.fromkeys(filter(None, known)))
    return earlier


def _logs(answers: Path, shared: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """By condition the settings of those that share a run's."""
    for header in headers(answers):
        if all(header.get(name) == value for name, value in shared.items()):
            key = header.pop("condition")
            yield key, header


def keys_of(row: Mapping[str, Any], logs: Collection[str]) -> list[str]:
    """Keys of a row's conditions, a seed each, of those that are known."""
    budget = None
    if row["num_keep"] is not None:
        budget = Budget(num_keep=row["num_keep"])
    elif row["budget"] is not None:
        budget = Budget(keep_ratio=row["budget"])
    names = {row["label"]} | ({f"{row['label']} @ {budget}"} if budget else set())
    found = [key for key in logs if key.rpartition(" # ")[0] in names]
    return sorted(found, key=lambda key: int(key.rpartition(" # ")[2]))


def _row(
    row: Mapping[str, Any],
    task: Task,
    records: Mapping[str, list[Record]],
    unpruned: Sequence[Record],
) -> Row:
    """A row again; without records what was said about it."""
    ratios = [task.compared(some, unpruned) for some in records.values()]
    counts = [record["kept"] for some in records.values() for record in some]
    names = ("label", "pruner", "budget", "num_keep", "control", "note", "trained")
    return Row(
        **{name: row[name] for name in names},
        seeds=len(ratios) or row["seeds"],
        visual_tokens=float(np.mean(counts)) if counts else None,
        figures={name: average([one[name] for one in ratios]) for name in (ratios or [{}])[0]},
        yours=row.get("yours", False),
    )


def _key(row: Row) -> Key:
    return row.label, row.budget


def names_of(keys: Iterable[Key]) -> str:
    """Rows in words: `random` at 25%, 12.5%; ..."""
    found: dict[str, list[str]] = {}
    for label, budget in keys:
        found.setdefault(label, []).append(budget_text(budget))
    return "; ".join(f"{code(label)} at {', '.join(budgets)}" for label, budgets in found.items())
