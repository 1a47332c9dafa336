"""`ocvtp merge`: two evaluations of one task and model, as one."""

from __future__ import annotations

import argparse
from pathlib import Path

from ocvtp.commands import output
from ocvtp.evaluation import earlier_runs
from ocvtp.evaluation.merge import merge
from ocvtp.evaluation.report import RESULTS, write_facts
from ocvtp.evaluation.scores import SCORES
from ocvtp.evaluation.tables import short
from ocvtp.reporting.folder_lock import claimed
from ocvtp.reporting.results_files import read_results


def run(arguments: argparse.Namespace) -> int:
    """Read both, join, write and print."""
    folder = output.folder(arguments.output)
    paths = [_file(given) for given in (arguments.a, arguments.b)]
    if (folder / RESULTS).resolve() in [path.resolve() for path in paths]:
        raise ValueError(
            f"--output {arguments.output} holds one of the two, which would be written over; pass"
            " another folder."
        )
    command = output.command(arguments)
    found, answers = merge(
        read_results(paths[0]),
        read_results(paths[1]),
        (str(paths[0]), str(paths[1])),
        arguments.prefer,
        command,
    )
    with claimed(folder, "ocvtp merge"):
        _refuse_another(folder, command)
        wrote = ", ".join(map(str, write_facts(found, folder, answers)))
    said = "".join(f"{text}\n" for text in found["remarks"])
    told = {name: value for name, value in found.items() if name != SCORES}
    output.emit(told, f"{said}{short(found)}\nwrote {wrote}", arguments.json)
    return 0


def _refuse_another(folder: Path, command: str) -> None:
    """Refuse a folder of results that this command did not write."""
    there = earlier_runs.read(folder)
    if there is not None and there["settings"].get("command") != command:
        raise ValueError(
            f"--output {folder} holds another evaluation, which would be written over; pass another"
            f" folder, or delete its {RESULTS}."
        )


def _file(given: str) -> Path:
    path = Path(given)
    return path / RESULTS if path.is_dir() else path
