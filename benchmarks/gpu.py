"""What is measured on a GPU, in one go, with random weights: nothing is downloaded.

    python -m benchmarks.gpu                                 # hours; goes on where it was stopped
    python -m benchmarks.gpu --only llava-1.5-7b --warmup 3 --repetitions 12
    python -m benchmarks.gpu --list                          # the commands alone

Writes docs/results/gpu/DEVICE/: a folder of results.json, report.md and plots for each run, the
training step in training.json, and goals.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import write

PRUNERS = ("ocvtp", "fopru", "visionzip", "divprune", "fastv", "random")
RUNS: dict[str, tuple[str, ...]] = {
    "llava-1.5-7b": (
        *("--random-weights", "llava-1.5-7b", "--pruners", *PRUNERS),
        *("--num-keep", "32", "64", "128", "192", "576", "--batch-size", "1", "8", "32"),
    ),
    "llava-next-7b": (
        *("--random-weights", "llava-next-7b", "--pruners", *PRUNERS),
        *("--num-keep", "160", "320", "640", "2880", "--batch-size", "1", "8"),
    ),
    "savings": (
        *("--random-weights", "llava-1.5-7b", "--pruners", "ocvtp", "ocvtp:early=true", "fopru"),
        *("--num-keep", "64", "--batch-size", "1", "8", "--savings", "each"),
    ),
    "prompts": (
        *("--random-weights", "llava-1.5-7b", "--pruners", "ocvtp", "fopru", "--num-keep", "64"),
        *("--batch-size", "8", "--text-length", "64", "512", "--images-per-prompt", "1", "4"),
    ),
}
TRAINING = ((12, "float32"), (64, "float32"), (64, "bfloat16"))
"""Batches and dtypes of the training step; the first is that of configs/train/clip_l14_336.yaml."""
COCO_IMAGES, EPOCHS = 118_287, 30
SHARE_GOAL, SPEED_GOAL = 0.03, 0.85
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "gpu"
WORK = Path("outputs") / "gpu"


def command(name: str, warmup: int, repetitions: int) -> list[str]:
    """The words of `ocvtp bench` of a run."""
    words = ["bench", *RUNS[name], "--dtype", "bfloat16", "--device", "cuda", "--skip-unfit"]
    words += ["--warmup", str(warmup), "--repetitions", str(repetitions)]
    return [*words, "--output", str(WORK / name)]


def training_command(batch: int, dtype: str) -> list[str]:
    """The training step, in a process of its own, whose peak memory is its alone."""
    words = ["--only", "training", "--device", "cuda", "--batch-size", str(batch)]
    return [sys.executable, "-m", "benchmarks.road", *words, "--dtype", dtype]


def training(batch: int, dtype: str) -> dict[str, Any]:
    """The training step, and the hours that the paper's run takes at its pace."""
    run = subprocess.run(
        training_command(batch, dtype), capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(f"the training step failed:\n{run.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    seconds = EPOCHS * COCO_IMAGES / found["images per second"]
    return found | {f"hours of {EPOCHS} epochs of {COCO_IMAGES} images": round(seconds / 3600, 2)}


def goals(results: dict[str, Any]) -> Iterator[str]:
    """What is asked of batch 8, row by row: the pruner's own time, the speed-up of the prefill."""
    for cell in results["cells"]:
        if cell["batch_size"] != 8:
            continue
        for row in cell["rows"][1:]:
            left, ratio = row["operations_left"]["prefill"], row["figures"]["prefill"]["ratio"]
            if left < 1:
                reached = left / ratio["value"]
                yield _line(row["key"], "prefill speed-up / possible", reached, SPEED_GOAL, True)
            if row["label"] == "ocvtp":
                share = row["select_share_of_ttft"]
                yield _line(row["key"], "select / TTFT", share, SHARE_GOAL, False)


def _line(row: str, what: str, value: float, goal: float, at_least: bool) -> str:
    met = value >= goal if at_least else value <= goal
    sign = ">=" if at_least else "<="
    return f"- {'met' if met else 'NOT met'}: {row}, {what} {value:.3f} ({sign} {goal})"


def main() -> None:
    """Run all, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*RUNS, "training"])
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    arguments = parser.parse_args()
    chosen = [arguments.only] if arguments.only else [*RUNS, "training"]
    benches = {
        name: command(name, arguments.warmup, arguments.repetitions)
        for name in chosen
        if name != "training"
    }
    if arguments.list:
        for words in benches.values():
            print(shlex.join(["ocvtp", *words]))
        if "training" in chosen:
            for step in TRAINING:
                print(shlex.join(training_command(*step)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this measures a GPU; `--list` prints the commands.")
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = RESULTS / device
    if "training" in chosen:  # first: it is short
        steps = [training(*step) for step in TRAINING]
        write(folder / "training.json", {"device": device, "steps": steps})
    for name, words in benches.items():
        subprocess.run([sys.executable, "-m", "ocvtp.cli", *words], check=True)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in (WORK / name).glob("*.*"):
            shutil.copy(path, folder / name / path.name)
        lines = list(goals(json.loads((WORK / name / "results.json").read_text())))
        if lines:
            (folder / name / "goals.md").write_text(
                "\n".join([f"# Goals, {device}", "", *lines, ""])
            )


if __name__ == "__main__":
    main()
