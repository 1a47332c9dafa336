"""What is measured on a GPU of minutes: in time, one cell after the other, whatever fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_run
from benchmarks.gpu_cells import (
    BUILD,
    CELLS,
    FULL,
    LLAVA,
    SMOKE,
    BrokenDevice,
    Job,
    Place,
    request_seconds,
)
from benchmarks.gpu_report import goals


class Clock:
    """Time that passes only when cells say so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make_jobs(clock, **seconds):
    """Cells that should take as long as the first number says and take as long as the second."""

    def job(name, planned, taken):
        def run(place):
            clock.now += taken
            if taken < 0:
                raise RuntimeError(f"{name} broke")
            return {"value": taken}

        return Job(name, f"what {name} is", planned, run)

    return [job(name, *times) for name, times in seconds.items()]


def states(folder):
    found = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    return {cell["cell"]: cell["state"] for cell in found}


@pytest.mark.slow
def test_none_begins_that_would_not_end_and_another_run_goes_on(tmp_path):
    clock, place = Clock(), Place(SMOKE, tmp_path)
    jobs = make_jobs(clock, a=(10, 10), long=(60, 60), b=(10, 10))
    gpu_run.run(jobs, place, 50, clock)
    assert states(tmp_path) == {"a": "done", "b": "done"}
    gpu_run.run(jobs, place, 65, clock)
    assert states(tmp_path) == {"a": "done", "b": "done", "long": "done"}
    assert clock.now == 100 + 10 + 10 + 60, "a cell that is done was run again"


@pytest.mark.slow
def test_where_cells_take_longer_the_next_are_expected_to(tmp_path):
    clock = Clock()
    jobs = make_jobs(clock, a=(10, 30), b=(20, 20), c=(5, 5))
    gpu_run.run(jobs, Place(SMOKE, tmp_path), 80, clock)
    assert states(tmp_path) == {"a": "done", "c": "done"}


@pytest.mark.slow
def test_a_cell_that_fails_is_written_and_tried_again_after_the_others(tmp_path):
    clock, place, reports = Clock(), Place(SMOKE, tmp_path), []
    gpu_run.run(make_jobs(clock, a=(10, -1), b=(10, 10)), place, 50, clock)
    assert states(tmp_path) == {"a": "failed", "b": "done"}
    assert "RuntimeError: a broke" in (tmp_path / "cells" / "a.json").read_text()
    jobs = make_jobs(clock, a=(10, 10), b=(10, -1), c=(10, 10), d=(10, 10))
    gpu_run.run(jobs, place, 15, clock, skip=("c",), ended=lambda: reports.append(1))
    assert states(tmp_path) == {"a": "failed", "b": "done", "d": "done"}
    gpu_run.run(jobs, place, 50, clock, ended=lambda: reports.append(1))
    assert set(states(tmp_path).values()) == {"done"}
    assert len(reports) == 3


def test_nothing_begins_on_a_broken_device(tmp_path, monkeypatch):
    def broken(self):
        raise BrokenDevice("an illegal memory access")

    monkeypatch.setattr(Place, "tidy", broken)
    clock = Clock()
    with pytest.raises(BrokenDevice):
        gpu_run.run(make_jobs(clock, a=(10, -1), b=(9, 9)), Place(SMOKE, tmp_path), 50, clock)
    assert states(tmp_path) == {"a": "failed"}


CELLS_OF_ALL_FATES = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu import BROKEN, read_cells, write_cell

folder = Path(sys.argv[1])
skip = sys.argv[sys.argv.index("--skip") + 1 :] if "--skip" in sys.argv else []
done = [cell["cell"] for cell in read_cells(folder) if cell["state"] == "done"]
for name in ("killed", "hangs", "breaks", "good"):
    if name in done or name in skip:
        continue
    cell = {"cell": name, "what": name, "limit": 3}
    write_cell(folder, cell | {"state": "begun"})
    if name == "killed":
        os.kill(os.getpid(), 9)
    if name == "hangs":
        time.sleep(100)
    write_cell(folder, cell | {"state": "failed" if name == "breaks" else "done", "error": ""})
    if name == "breaks":
        sys.exit(BROKEN)
"""


@pytest.mark.slow
def test_the_others_go_on_whatever_becomes_of_a_process(tmp_path):
    words = [sys.executable, "-c", CELLS_OF_ALL_FATES, str(tmp_path)]
    gpu.write_cell(tmp_path, {"cell": "earlier", "state": "begun", "limit": 3})
    begin = time.monotonic()
    assert gpu.watch(words, tmp_path, 300) == 0
    assert time.monotonic() - begin < 90
    assert states(tmp_path) == {
        "earlier": "failed", "killed": "failed", "hangs": "failed", "breaks": "failed",
        "good": "done",
    }  # fmt: skip
    errors = {cell["cell"]: cell.get("error") for cell in gpu.read_cells(tmp_path)}
    assert errors["killed"] == "its process ended with -9"
    assert errors["hangs"] == "it took longer than 3 s"
    assert errors["earlier"] == "the run was stopped while it ran"


@pytest.mark.slow
def test_a_cell_is_ended_when_the_time_is_over(tmp_path):
    script = CELLS_OF_ALL_FATES.replace('("killed", "hangs"', '("hangs"').replace(": 3}", ": 99}")
    assert gpu.watch([sys.executable, "-c", script, str(tmp_path)], tmp_path, 8) == -9
    (cell,) = gpu.read_cells(tmp_path)
    assert (cell["state"], cell["error"]) == ("failed", "the time was over")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_cells_end_with_who_watches_them(tmp_path, number):
    script = (
        "import sys, time; from benchmarks import gpu\n"
        "gpu.watch = lambda words, folder, seconds: (print('begun', flush=True), time.sleep(60))\n"
        "gpu.main(['--output', sys.argv[1]])"
    )
    words = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.wait(30) == 128 + number  # not -number: it had the time to end them


@pytest.mark.slow
def test_cells_end_where_who_watches_them_is_killed(tmp_path):
    """The real process of a smoke run, and what a cell of it has started."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--output", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        until(lambda: "begun" in states(tmp_path).values())
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    until(lambda: not is_running(int(child)), seconds=5)


def test_what_a_process_started_ends_with_its_watcher_too(tmp_path):
    cells = (
        "import os, subprocess, sys; from benchmarks.gpu import end_with\n"
        "started = subprocess.Popen(['sleep', '60'])\n"
        "print(os.getpid(), started.pid, flush=True)\n"
        "end_with(int(sys.argv[sys.argv.index('--watcher') + 1]))\n"
        "started.wait()"
    )
    script = (
        "import sys; from pathlib import Path; from benchmarks import gpu\n"
        f"gpu.watch([sys.executable, '-c', {cells!r}], Path(sys.argv[1]), 60)"
    )
    words = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        pids = list(map(int, process.stdout.readline().split()))
        assert all(map(is_running, pids))
        process.kill()
    until(lambda: not any(map(is_running, pids)))


def is_running(pid):
    """Whether there is such a process, and it is none that ended and that nobody asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_model_that_must_be_built_takes_time(tmp_path):
    place = Place(FULL, tmp_path)
    job = replace(make_jobs(Clock(), a=(10, 10))[0], model=LLAVA)
    assert place.seconds(job) == 10 + BUILD
    place.subjects[LLAVA] = None
    assert place.seconds(job) == 10


@pytest.mark.slow
def test_seconds_follow_operations():
    whole, pruned, more = (
        request_seconds(LLAVA, batch, keep, "bfloat16")
        for batch, keep in ((8, None), (8, 64), (16, None))
    )
    assert pruned < whole < more < 2 * whole


@pytest.mark.slow
def test_the_plan_of_eight_minutes_reaches_the_tests(capsys):
    gpu_run.main(["--plan", "--seconds", str(60 * 8 - gpu.SPARE_SECONDS)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [make(SMOKE).name for make in CELLS]
    assert float(next(line for line in lines if line.startswith("tests")).split()[3]) < 8
    left = [line.split()[0] for line in lines if "left out" in line]
    assert left == ["llava-b32-k64", "qwen-b1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "pass --output DIR, or --plan"),
        (["--output", "x", "--minutes", "0"], "pass a number above 0"),
        (["--plan", "--minutes", "-1"], "pass a number above 0"),
    ],
)
def test_wrong_words(words, said, capsys):
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert said in capsys.readouterr().err


def test_cells_of_another_device_are_refused(tmp_path):
    gpu_run.check_folder(tmp_path, {"device": "one", "smoke": False})
    gpu_run.check_folder(tmp_path, {"device": "one", "smoke": False})
    with pytest.raises(SystemExit, match="holds cells of .*'one'.*pass another folder"):
        gpu_run.check_folder(tmp_path, {"device": "two", "smoke": False})


def test_goals_are_judged():
    def row(key, reached, share, speed):
        return {
            "key": key, "label": key.split()[0], "prefill speed-up / possible": reached,
            "select / TTFT": share, "ttft speed-up": speed,
        }  # fmt: skip

    rows = [row("ocvtp K=160", 0.95, 0.05, 4.5), row("fopru K=160", 0.633, 0.01, 4)]
    cells = [
        {"cell": "llava-b8-k64", "found": {"batch": 8, "rows": rows}},
        {"cell": "next-b1", "found": {"batch": 1, "rows": rows}},
        {"cell": "train", "found": {"images per second from extracted features": 1200.0}},
        {"cell": "broken"},
    ]
    assert list(goals(cells)) == [
        "- met: llava-b8-k64, ocvtp K=160, prefill speed-up / possible 0.95 (>= 0.85)",
        "- NOT met: llava-b8-k64, ocvtp K=160, select / TTFT 0.05 (<= 0.03)",
        "- NOT met: llava-b8-k64, fopru K=160, prefill speed-up / possible 0.633 (>= 0.85)",
        "- met: next-b1, ocvtp K=160, TTFT speed-up 4.5 (>= 4)",
        "- met: train, images a second, extracted features 1.2e+03 (>= 1,000)",
    ]


def test_the_report_is_made_of_whatever_is_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_run.main(["--report", "--smoke", "--output", str(tmp_path)])
    assert "holds no cells" in capsys.readouterr().err
    gpu_run.check_folder(tmp_path, {"device": "one", "smoke": True})
    gpu.write_cell(
        tmp_path, {"cell": "tests", "what": "w", "state": "failed", "error": "OOM", "seconds": 1}
    )
    gpu.write_cell(tmp_path, {"cell": "select", "state": "begun"})
    gpu_run.main(["--report", "--smoke", "--output", str(tmp_path)])
    report = (tmp_path / "report.md").read_text()
    assert "Failed: `OOM`" in report
    assert "Unmeasured, for want of time: checks, llava-b8-k64" in report


@pytest.mark.slow
def test_all_cells_run_on_a_cpu(tmp_path):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--smoke", "--minutes", "25", "--output", str(tmp_path)])
    assert ended.value.code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(cell["cell"], cell["state"]) for cell in results["cells"]] == [
        (make(SMOKE).name, "done") for make in CELLS
    ]
    said = {name: check["said"] for name, check in results["cells"][0]["found"]["checks"].items()}
    assert set(said.values()) == {"holds"}, said
    report = (tmp_path / "report.md").read_text()
    assert "| ridge K=16 |" in report
    assert "Unmeasured" not in report
    assert (tmp_path / "ttft.png").stat().st_size > 10_000
