"""Commands that are killed (SIGKILL) at random moments and repeated, against one that was not.

A run is a fork of a process that has imported everything, so that most of its time is its work.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ocvtp.cli import main
from ocvtp.data.scenes import write_scenes


@dataclass(frozen=True)
class Killed:
    """A command that is killed.

    Args:
        words: of the command, by the folder that it writes to.
        again: those that continue, by the folder; where there is nothing to continue from, `words`.
        result: what it left, to be compared.
    """

    words: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    again: Callable[[Path], list[str]] | None = None


def kills(
    commands: Sequence[str], points: int, root: Path, start: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kill each command at random moments of its run, repeat it, and compare what it leaves.

    Args:
        commands: of `COMMANDS`.
        points: of each.
        root: folder to work in.
        start: seed of the moments.

    Yields:
        after each point, the command, and of it the points so far, how many ended as the run that
        was not killed, how many found something to continue from, and what differed.
    """
    prepared = _prepare(root)
    moments = random.Random(start)
    for name in commands:
        for found in _of(prepared[name], points, root / name, moments):
            yield name, found


def _of(one: Killed, points: int, root: Path, moments: random.Random) -> Iterator[dict[str, Any]]:
    shutil.rmtree(root, ignore_errors=True)
    whole = root / "whole"
    began = time.monotonic()
    status = _forked(one.words(whole), None, root / "whole.log")
    if status != 0:
        raise ValueError(f"{one.words(whole)} ended with {status}; see {root / 'whole.log'}.")
    seconds = time.monotonic() - began
    wanted = one.result(whole)
    found: dict[str, Any] = {"points": 0, "alike": 0, "hit": 0, "seconds": seconds}
    found |= {"continued": 0, "faults": []}
    for point in range(points):
        folder = root / str(point)
        moment = moments.uniform(0, seconds)
        found["hit"] += _forked(one.words(folder), moment, root / f"{point}.log") < 0
        words = one.words(folder)
        if one.again is not None and (folder / "checkpoints/last.ckpt").is_file():
            words = one.again(folder)
            found["continued"] += 1
        elif one.again is None:
            found["continued"] += folder.is_dir() and any(folder.iterdir())
        status = _forked(words, None, root / f"{point}.again.log")
        if status != 0:
            said = (root / f"{point}.again.log").read_text()[-300:]
            found["faults"].append(f"at {moment:.2f} s: status {status}: {said}")
        elif (differs := _difference(one.result(folder), wanted)) is not None:
            found["faults"].append(f"at {moment:.2f} s: {differs}")
        else:
            found["alike"] += 1
            shutil.rmtree(folder)
        found["points"] += 1
        yield found


def _forked(words: Sequence[str], kill_after: float | None, log: Path) -> int:
    """The exit status of a command in a process of its own; -9 where it was killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        status = 99
        try:
            status = main(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    ends = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if ends is not None and time.monotonic() >= ends:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.01)


# ---------------------------------------------------------------- what they leave


def _difference(got: Any, wanted: Any, where: str = "") -> str | None:
    """Where two results differ; None where they do not."""
    if isinstance(wanted, torch.Tensor):
        same = isinstance(got, torch.Tensor) and got.dtype == wanted.dtype and got.equal(wanted)
    elif isinstance(wanted, dict) and isinstance(got, dict) and got.keys() == wanted.keys():
        parts = (_difference(got[key], wanted[key], f"{where}/{key}") for key in wanted)
        return next((part for part in parts if part is not None), None)
    else:
        same = got == wanted
    return None if same else f"{where or 'it'} differs: {str(got)[:80]} and {str(wanted)[:80]}"


def _files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """What lies under final names; temporary files begin with a dot."""
    paths = (path for path in folder.rglob(pattern) if path.is_file() and path.name[0] != ".")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _training(folder: Path) -> dict[str, Any]:
    """Weights, optimiser and progress of the last checkpoint."""
    content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    optimiser = content["optimizer_states"][0]["state"]
    return {
        "weights": content["state_dict"],
        "optimiser": {number: dict(state) for number, state in optimiser.items()},
        "step": content["global_step"],
        "rate": content["lr_schedulers"],
    }


def _evaluation(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "results.json").read_text())
    answers = {name: data for name, data in _files(folder / "answers").items()}
    return {"rows": found["rows"], "answers": found["answers"], "logs": answers}


def _benchmark(folder: Path) -> dict[str, Any]:
    """The rows and what does not depend on the clock."""
    found = json.loads((folder / "results.json").read_text())
    cells = [
        [(row["key"], row["kept"], row["operations_left"], row["flops"]) for row in cell["rows"]]
        for cell in found["cells"]
    ]
    return {"cells": cells, "settings": found["settings"]}


def _prepare(root: Path) -> dict[str, Killed]:
    """The commands, on data that is made first."""
    root.mkdir(parents=True, exist_ok=True)
    scenes, photos = root / "scenes", root / "photos"
    write_scenes(scenes, num_train=48, num_val=4, size=96, seed=0)
    photos.mkdir(exist_ok=True)
    for number in range(60):
        Image.effect_noise((700, 500), 80).convert("RGB").save(photos / f"{number}.jpg")
    (root / "train.json").write_text(json.dumps(_settings(scenes)))
    train = ["--config", str(root / "train.json"), "--output"]

    def trained(folder: Path) -> list[str]:
        return ["train", *train, str(folder)]

    evaluated = ["evaluate", "--model", "random:tiny-llava", "--task", "scenes", "--split", "test"]
    evaluated += ["--num-images", "3", "--questions", "2", "--batch-size", "1", "--seeds", "1"]
    evaluated += [
        "--pruners",
        "uniform",
        "fastervlm",
        "--num-keep",
        "8",
        "--no-controls",
        "--output",
    ]
    timed = ["bench", "--model", "random:tiny-llava", "--pruners", "uniform", "--num-keep", "8"]
    timed += ["--warmup", "0", "--repetitions", "5", "--savings", "none"]
    timed += ["--text-length", "24", "32"]
    timed += ["--new-tokens", "3", "--image-size", "96", "96", "--output"]
    return {
        "train": Killed(trained, _training, lambda f: [*trained(f), "--resume", "last"]),
        "extract": Killed(
            lambda f: ["extract", *train[:2], "--output", str(f), "--shard-size", "6"],
            lambda f: _files(f, "*.safetensors"),
        ),
        "evaluate": Killed(lambda f: [*evaluated, str(f)], _evaluation),
        "bench": Killed(lambda f: [*timed, str(f)], _benchmark),
        "resize": Killed(
            lambda f: ["resize", str(photos), str(f), "--size", "128", "--num-workers", "1"],
            _files,
        ),
    }


COMMANDS = ("train", "extract", "evaluate", "bench", "resize")


def _settings(scenes: Path) -> dict[str, Any]:
    encoder = {
        "class_path": "ocvtp.encoders.clip.CLIPEncoder",
        "init_args": {"tower": "random:tiny", "layer": 2},
    }
    decoder = {"num_layers": 1, "num_heads": 2, "ffn_dim": 64}
    return {
        "model": {
            "encoder": encoder,
            "objective": {
                "class_path": "ocvtp.slots.objectives.SlotsObjective",
                "init_args": {"decoder": decoder},
            },
            "network": {"hidden_dim": 32, "slot_dim": 16, "ffn_dim": 32, "noise_rows": 64},
            "num_slots": [4, 8],
            "val_num_slots": 6,
        },
        "data": {
            "class_path": "ocvtp.data.module.CocoDataModule",
            "init_args": {"root": str(scenes), "batch_size": 4},
        },
        "checkpoint": {"every_n_train_steps": 1, "save_top_k": 1, "monitor": None},
        "trainer": {
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False},
            **{"num_sanity_val_steps": 0, "enable_progress_bar": False},
            **{"enable_model_summary": False},
        },
    }
