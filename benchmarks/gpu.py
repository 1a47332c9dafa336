"""What is worth knowing of a GPU that is there for minutes; random weights, no download.

    python -m benchmarks.gpu --minutes 8 --output docs/results/gpu/DEVICE
    python -m benchmarks.gpu --plan                     # the cells, and what each should take
    python -m benchmarks.gpu --smoke --output DIR       # the same code on a CPU, with tiny models

Cells come in the order of their worth. Each is written to DIR/cells when it ends, and none begins
that would not end in time; another run does what is missing. A cell that fails is written down with
its error, and the others go on. report.md and plots are made of whatever is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cells import BUILD, CELLS, FULL, SMOKE, Job, Place, Setting
from benchmarks.gpu_report import write_report
from benchmarks.timing import environment
from ocvtp.reporting.files import replacing

START_SECONDS = 25  # imports and the first call of a device
SPARE_SECONDS = 10  # for the report
Clock = Callable[[], float]


def check_folder(folder: Path, place: dict[str, Any]) -> None:
    """Refuse a folder with the cells of another device, or of tiny models beside others."""
    path = folder / "place.json"
    if path.is_file() and (known := json.loads(path.read_text())) != place:
        raise SystemExit(
            f"--output {folder} holds cells of {known}, this is {place}; pass another folder"
        )
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(place) + "\n")


def result_of(folder: Path, job: Job) -> dict[str, Any] | None:
    """What an earlier run wrote of a cell."""
    path = folder / "cells" / f"{job.name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def do(job: Job, place: Place, clock: Clock) -> dict[str, Any]:
    """Run a cell and write it, whatever becomes of it."""
    start = clock()
    found: dict[str, Any] = {"cell": job.name, "what": job.what, "estimate": job.seconds}
    try:
        found |= {"state": "done", "found": job.run(place)}
    except Exception as error:  # whatever it is, the other cells go on
        print(traceback.format_exc(), file=sys.stderr)
        found |= {"state": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    found["seconds"] = round(clock() - start, 1)
    with replacing(place.folder / "cells" / f"{job.name}.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    return found


def run(jobs: Sequence[Job], place: Place, seconds: float, clock: Clock) -> list[str]:
    """Do what is missing and ends in time; returns the names of what is left out.

    Where cells take longer than they should, the next are expected to as well.
    """
    deadline, slowness, left = clock() + seconds, 1.0, []
    for job in jobs:
        known = result_of(place.folder, job)
        if known is not None and known["state"] == "done":
            continue
        seconds = place.seconds(job)
        if clock() + slowness * seconds > deadline:
            left.append(job.name)
            continue
        print(f"{job.name}: {job.what} (about {slowness * seconds:.0f} s)", flush=True)
        found = do(job, place, clock)
        print(f"  {found['state']} in {found['seconds']} s", flush=True)
        if found["state"] == "done":
            slowness = max(slowness, found["seconds"] / seconds)
    return left


def plan_lines(jobs: Sequence[Job]) -> list[str]:
    """The cells with their seconds, one by one and in sum."""
    lines, total, built = [f"{'start':22s} {START_SECONDS:5.0f} s"], float(START_SECONDS), {""}
    for job in jobs:
        seconds = job.seconds + (0 if job.model in built else BUILD)
        built.add(job.model)
        total += seconds
        lines.append(f"{job.name:22s} {seconds:5.0f} s  {total / 60:5.1f} min  {job.what}")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Print the plan, or run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all, the start included")
    parser.add_argument("--output", type=Path, help="folder of the results; goes on with them")
    parser.add_argument("--plan", action="store_true", help="print the cells and stop")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    arguments = parser.parse_args(words)
    setting: Setting = SMOKE if arguments.smoke else FULL
    jobs = [make(setting) for make in CELLS]
    if arguments.plan:
        print("\n".join(plan_lines(jobs)))
        return
    if arguments.output is None:
        parser.error("pass --output DIR, or --plan")
    if not arguments.minutes > 0:
        parser.error(f"--minutes {arguments.minutes}; pass a number above 0")
    if setting.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; pass --smoke for a CPU, or --plan")
    place = Place(setting, arguments.output)
    facts = environment() | {"command": f"python -m benchmarks.gpu --minutes {arguments.minutes:g}"}
    if setting.device == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    seconds = 60 * arguments.minutes - SPARE_SECONDS - START_SECONDS * (not arguments.smoke)
    check_folder(arguments.output, {"device": facts["device"], "smoke": arguments.smoke})
    left = run(jobs, place, seconds, time.monotonic)
    done = [found for job in jobs if (found := result_of(place.folder, job)) is not None]
    paths = write_report(facts | {"left out": left}, done, place.folder)
    print(f"wrote {', '.join(str(path) for path in paths)}")
    if left:
        print(f"left out, for another run with the same --output: {', '.join(left)}")


if __name__ == "__main__":
    main()
