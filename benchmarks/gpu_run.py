"""The process in which `benchmarks.gpu` runs cells, one after the other.

python -m benchmarks.gpu_run --seconds 400 --output DIR     # `benchmarks.gpu` starts it so
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import BROKEN, START_SECONDS, end_with, read_cells, write_cell
from benchmarks.gpu_cells import BUILD, CELLS, FULL, SMOKE, BrokenDevice, Job, Place, Setting
from benchmarks.gpu_report import write_report
from benchmarks.timing import environment
from ocvtp.reporting.files import replacing

Clock = Callable[[], float]
_SAME = ("device", "smoke")  # of all cells of a folder


def check_folder(folder: Path, facts: dict[str, Any]) -> None:
    """Refuse a folder with the cells of another device, or of tiny models beside others."""
    path = folder / "place.json"
    known = json.loads(path.read_text()) if path.is_file() else facts
    if any(known[name] != facts[name] for name in _SAME):
        here, there = ({name: found[name] for name in _SAME} for found in (facts, known))
        raise SystemExit(
            f"--output {folder} holds cells of {there}, this is {here}; pass another folder"
        )
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(facts) + "\n")


def do(job: Job, place: Place, clock: Clock, expected: float) -> dict[str, Any]:
    """Run a cell and write it, whatever becomes of it; the watcher ends one that hangs.

    Raises:
        BrokenDevice: when it is written, if nothing runs on the device any more.
    """
    start = clock()
    found: dict[str, Any] = {"cell": job.name, "what": job.what, "estimate": job.seconds}
    limit = place.setting.limit(expected)
    write_cell(place.folder, {**found, "state": "begun", "limit": limit})
    try:
        found |= {"state": "done", "found": job.run(place)}
    except Exception as error:  # whatever it is, the other cells go on
        print(traceback.format_exc(), file=sys.stderr)
        found |= {"state": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    found["seconds"] = round(clock() - start, 1)
    write_cell(place.folder, found)
    place.tidy()
    return found


def run(
    jobs: Sequence[Job],
    place: Place,
    seconds: float,
    clock: Clock,
    skip: Collection[str] = (),
    ended: Callable[[], object] = lambda: None,
) -> None:
    """Do what is missing and ends in time; first what was never tried.

    Where cells take longer than they should, the next are expected to as well.

    Args:
        jobs: in the order of their worth.
        place: where they run.
        seconds: for all of them.
        clock: tells the time in seconds.
        skip: names of those that are not tried.
        ended: called after each.

    Raises:
        BrokenDevice: see `do`.
    """
    deadline, slowness = clock() + seconds, 1.0
    known = {cell["cell"]: cell["state"] for cell in read_cells(place.folder)}
    for job in sorted(jobs, key=lambda job: job.name in known):
        if known.get(job.name) == "done" or job.name in skip:
            continue
        planned = place.seconds(job)
        expected = slowness * planned
        if clock() + expected > deadline:
            continue
        print(f"{job.name}: {job.what} (about {expected:.0f} s)", flush=True)
        found = do(job, place, clock, expected)
        print(f"  {found['state']} in {found['seconds']} s", flush=True)
        if found["state"] == "done":
            slowness = max(slowness, found["seconds"] / planned)
        ended()


def report(jobs: Sequence[Job], folder: Path, draw: bool = True) -> list[Path]:
    """What the cells in a folder say, on whatever machine."""
    cells = {cell["cell"]: cell for cell in read_cells(folder) if cell["state"] != "begun"}
    left = [job.name for job in jobs if job.name not in cells]
    there = [cells[job.name] for job in jobs if job.name in cells]
    facts = json.loads((folder / "place.json").read_text())
    return write_report(facts | {"left out": left}, there, folder, draw)


def plan_lines(jobs: Sequence[Job], limit: float) -> list[str]:
    """The cells with their seconds, one by one and in sum, and those that the limit leaves out."""
    lines, total, built = [f"{'start':22s} {START_SECONDS:5.0f} s"], float(START_SECONDS), {""}
    for job in jobs:
        seconds = job.seconds + (0 if job.model in built else BUILD)
        if total + seconds > limit:
            lines.append(f"{job.name:22s} {seconds:5.0f} s  left out   {job.what}")
            continue
        built.add(job.model)
        total += seconds
        lines.append(f"{job.name:22s} {seconds:5.0f} s  {total / 60:5.1f} min  {job.what}")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Print the plan, run it, or write the report again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.0, help="for all, the start included")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--watcher", type=int, help="the process that it ends with")
    parser.add_argument("--skip", nargs="*", default=[], help="cells that are not tried")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args(words)
    if arguments.watcher is not None:
        end_with(arguments.watcher)
    setting: Setting = SMOKE if arguments.smoke else FULL
    jobs = [make(setting) for make in CELLS]
    if arguments.plan:
        print("\n".join(plan_lines(jobs, arguments.seconds)))
        return
    if arguments.report and not (arguments.output / "place.json").is_file():
        parser.error(f"--output {arguments.output} holds no cells; pass a folder of results")
    if not arguments.report:
        if setting.device == "cuda" and not torch.cuda.is_available():
            parser.error("there is no CUDA device; pass --smoke for a CPU, or --plan")
        place = Place(setting, arguments.output)
        facts = environment() | {"command": "python -m benchmarks.gpu", "smoke": arguments.smoke}
        if setting.device == "cuda":
            facts |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        check_folder(arguments.output, facts)
        left = arguments.seconds - START_SECONDS * (not arguments.smoke)
        try:
            run(
                jobs, place, left, time.monotonic, arguments.skip,
                lambda: report(jobs, arguments.output, draw=False),
            )  # fmt: skip
        except BrokenDevice as error:
            print(f"the device is broken: {error}", file=sys.stderr)
            sys.exit(BROKEN)
    paths = report(jobs, arguments.output)
    print(f"wrote {', '.join(str(path) for path in paths)}")


if __name__ == "__main__":
    main()
