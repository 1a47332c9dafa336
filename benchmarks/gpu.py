"""What is worth knowing of a GPU that is there for minutes; random weights, no download.

    python -m benchmarks.gpu --minutes 8 --output docs/results/gpu/DEVICE
    python -m benchmarks.gpu --plan                     # the cells, and what each should take
    python -m benchmarks.gpu --report --output DIR      # report and plots again, on any machine
    python -m benchmarks.gpu --smoke --output DIR       # the same code on a CPU, with tiny models

Cells come in the order of their worth. Each is written to DIR/cells when it ends, and none begins
that would not end in time; another run does what is missing. A cell that fails is written down with
its error, and the others go on. report.md and plots are made of whatever is there.

Cells run in a process of their own, `benchmarks.gpu_run`, which this one watches: where it hangs,
is killed or breaks its device, the cell is written as failed, and a new process does the next.
Where this one is killed, the other ends itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ocvtp.reporting.files import replacing

START_SECONDS = 25  # imports and the first call of a device
SPARE_SECONDS = 15  # for the report, where the last cell had to be ended
BROKEN = 3  # what the process ends with where its device is broken
_ROOT = Path(__file__).parents[1]
_LOOK_SECONDS = 0.2
_STOPPED = "the run was stopped while it ran"


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """The cells of a folder, in no order."""
    return [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]


def write_cell(folder: Path, cell: dict[str, Any]) -> None:
    """Write a cell, whole or not at all."""
    with replacing(folder / "cells" / f"{cell['cell']}.json") as temporary:
        temporary.write_text(json.dumps(cell, indent=1) + "\n")


def end_with(watcher: int) -> None:
    """End this process, with all of its group, when the one that started it is gone, even killed.

    Args:
        watcher: its process id.
    """

    def look() -> None:
        while os.getppid() == watcher:
            time.sleep(_LOOK_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=look, daemon=True).start()


def _failed_since(folder: Path, when: float) -> list[str]:
    """Names of the cells that failed in this run; older ones are tried again."""
    files = [path for path in (folder / "cells").glob("*.json") if path.stat().st_mtime >= when]
    cells = [json.loads(path.read_text()) for path in files]
    return [cell["cell"] for cell in cells if cell["state"] == "failed"]


def watch(words: Sequence[str], folder: Path, seconds: float) -> int:
    """Run cells in one process after the other, until none is left that was not tried.

    Args:
        words: what starts a process; `--seconds`, `--watcher` and `--skip` are added.
        folder: of the results.
        seconds: for all.

    Returns:
        what the last process ended with.
    """
    deadline, lost = time.monotonic() + seconds, list[str]()
    if (cell := _begun(folder)) is not None:  # all of an earlier run was killed
        write_cell(folder, {**cell, "state": "failed", "error": _STOPPED, "seconds": 0})
    when = time.time()
    while True:
        left = deadline - time.monotonic()
        more = ["--seconds", f"{left:.1f}", "--watcher", str(os.getpid())]
        more += ["--skip", *lost] if lost else []
        code, cell, why = _until_it_ends([*words, *more], folder, deadline)
        if cell is None and code != BROKEN:
            return code
        if cell is not None:
            print(f"  {cell['cell']} is ended: {why}", flush=True)
            write_cell(folder, {**cell, "state": "failed", "error": why})
        lost = _failed_since(folder, when)
        if deadline - time.monotonic() < START_SECONDS:
            return code


def _until_it_ends(
    words: Sequence[str], folder: Path, deadline: float
) -> tuple[int, dict[str, Any] | None, str]:
    """Start a process and see that it ends; returns its code, the cell that it lost, and why."""
    process = subprocess.Popen(words, cwd=_ROOT, start_new_session=True)
    why, name, since = "", "", time.monotonic()
    try:
        while process.poll() is None and not why:
            time.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            if (cell := _begun(folder)) is not None and cell["cell"] != name:
                name, since = cell["cell"], now
            if cell is not None and cell["cell"] == name and now - since > cell["limit"]:
                why = f"it took longer than {cell['limit']:.0f} s"
            elif now > deadline:
                why = "the time was over"
    finally:
        _kill(process)
    cell = _begun(folder)
    if cell is not None:
        cell["seconds"] = round(time.monotonic() - since, 1)
    return process.returncode, cell, why or f"its process ended with {process.returncode}"


def _begun(folder: Path) -> dict[str, Any] | None:
    return next((cell for cell in read_cells(folder) if cell["state"] == "begun"), None)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started: tests, compilers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(words: Sequence[str] | None = None) -> None:
    """Print the plan, run it, or write the report again."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all, the start included")
    parser.add_argument("--output", type=Path, help="folder of the results; goes on with them")
    parser.add_argument("--plan", action="store_true", help="print the cells and stop")
    parser.add_argument("--report", action="store_true", help="write it again of what is there")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    arguments = parser.parse_args(words)
    process = [sys.executable, "-m", "benchmarks.gpu_run", *["--smoke"] * arguments.smoke]
    if not arguments.minutes > 0:
        parser.error(f"--minutes {arguments.minutes}; pass a number above 0")
    if arguments.plan:
        process += ["--plan", "--seconds", str(60 * arguments.minutes - SPARE_SECONDS)]
        sys.exit(subprocess.run(process, cwd=_ROOT, check=False).returncode)
    if arguments.output is None:
        parser.error("pass --output DIR, or --plan")
    folder = arguments.output.resolve()
    process += ["--output", str(folder)]
    code = 0
    if not arguments.report:
        for number in (signal.SIGTERM, signal.SIGHUP):  # cells end with this process
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        spare = SPARE_SECONDS + time.monotonic() - begin
        code = watch(process, folder, 60 * arguments.minutes - spare)
    if arguments.report or code == BROKEN or code < 0:  # killed: it could not write the last cell
        code = subprocess.run([*process, "--report"], cwd=_ROOT, check=False).returncode
    sys.exit(code)


if __name__ == "__main__":
    main()
