"""Rows of earlier runs in a folder, which a later run of the same task does not ask for again.

What results.json lists is made again from the stored answers, so that all rows are compared with
the same ones, whichever run asked them. Where these are not there, a run would lose rows, and is
refused before anything is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
Stored = tuple[Mapping[str, Any], dict[str, list[Record]]]
"""A row of results.json, and the records of its conditions by key."""


@dataclass(frozen=True, eq=False)
class Earlier:
    """What an earlier run left.

    Args:
        rows: that are kept. records: of their conditions, by key.
        typed: the commands that made the rows.
    """

    rows: list[Row] = field(default_factory=list)
    records: dict[str, list[Record]] = field(default_factory=dict)
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
        judged = [_key(row) for row in self.rows if row.figures]  # and not without a note why not
        return [f"kept from earlier runs in this folder: {names_of(judged)}."] if judged else []


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


def stored(
    folder: Path,
    found: Mapping[str, Any] | None,
    answers: Path,
    shared: Mapping[str, Any],
    num_items: int,
    asked: Collection[Key],
) -> list[Stored]:
    """The rows of an earlier run that this one does not ask for, with their answers.

    Args:
        folder: of the results.
        found: as `read` gives them.
        answers: folder of the logs.
        shared: the settings that all conditions of a run share.
        num_items: of the task.
        asked: rows of this run.

    Raises:
        ValueError: for a row whose answers are not there: it would be lost.
    """
    logs: dict[str, dict[str, Any]] = {}
    changed: set[str] = set()
    for header in headers(answers):
        differ = {name for name, value in shared.items() if header.get(name) != value}
        changed |= differ
        if not differ:
            logs[header.pop("condition")] = header
    there, lost = list[Stored](), list[Key]()
    for row in () if found is None else found["rows"]:
        if (row["label"], row["budget"]) in asked:
            continue
        keys = keys_of(row, logs)[: row["seeds"]]
        records = {key: Log(answers, key, logs[key]).records for key in keys}
        records = {key: some for key, some in records.items() if len(some) == num_items}
        if row["figures"] and not records:
            lost.append((row["label"], row["budget"]))
        there.append((row, records))
    if lost:
        why = (
            f"are of other settings ({', '.join(sorted(changed))})" if changed else "are not there"
        )
        raise ValueError(
            f"{folder / RESULTS} has rows whose answers {why}, so that they would be lost:"
            f" {names_of(lost)}. Pass another --output, where `ocvtp merge` joins both, or delete"
            " that file."
        )
    return there


def kept(
    found: Mapping[str, Any] | None,
    there: Sequence[Stored],
    task: Task,
    unpruned: Sequence[Record],
) -> Earlier:
    """The rows of an earlier run of which this one has no figures.

    Args:
        found: as `read` gives it. there: of that, as `stored` gives it.
        task: what is asked.
        unpruned: records of the unpruned model, of this run.
    """
    earlier = Earlier([_row(*one, task, unpruned) for one in there])
    for _, records in there:
        earlier.records.update(records)
    if found is not None and earlier.rows:
        settings = found["settings"]
        known = [*settings.get("earlier_commands", []), settings.get("command")]
        earlier.typed.extend(dict.fromkeys(filter(None, known)))
    return earlier


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
    records: Mapping[str, list[Record]],
    task: Task,
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
