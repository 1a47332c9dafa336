"""What training runs left in their folders: settings, curves, best figures.

A run is what a CSVLogger and `config.yaml` tell of it. Folders may be half-written, or of something
else: what cannot be read is said in a note, and the rest is shown.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ocvtp.plain_yaml import read_value

_MOST = 1_000_000  # bytes of settings
_PLACES = ("output", "resume", "config", "default_root_dir", "dirpath", "save_dir")
_PLAIN = ("trainer.logger", "trainer.callbacks")
_LENGTHS = tuple(f"trainer.{n}" for n in ("max_epochs", "max_steps", "max_time", "devices"))
_HIGHER = re.compile(
    r"(fg_ari|mbo_i|unique_tokens|slots_in_use|foretold|accuracy\w*|agreement\w*|overlap\w*)$"
)
"""Figures that are better where they are higher; of all others the lowest is the best."""


@dataclass
class Run:
    """One run, with those that continued it.

    Args:
        name: of its folder, below the one that was asked for.
        folder: with the checkpoints.
        settings: by their names on the command line.
        curves: of each figure the steps and its values, in the order of the steps.
        checkpoints: names of its files.
        notes: what could not be read.
        resumed: whether it was told to go on from a checkpoint.
    """

    name: str
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resumed: bool = False

    @property
    def steps(self) -> int:
        """Taken, as far as they were logged."""
        return max((points[-1][0] + 1 for points in self.curves.values() if points), default=0)

    def best(self, figure: str) -> tuple[float, int] | None:
        """The best value of a figure and its step; None without any."""
        points = [(value, step) for step, value in self.curves.get(figure, ())]
        if not points:
            return None
        return (max if is_higher_better(figure) else min)(points)


def is_higher_better(figure: str) -> bool:
    """Whether a figure is better where it is higher."""
    return _HIGHER.search(figure) is not None


def find_runs(folders: Sequence[str]) -> tuple[list[Run], list[str]]:
    """The runs in folders and below them, and a line for each folder that has none.

    Args:
        folders: of one run, or of many.

    Raises:
        ValueError: if there is no run at all.
    """
    runs, notes = list[Run](), list[str]()
    for given in folders:
        top = Path(given)
        if not top.is_dir():
            notes.append(f"{given} is no folder")
            continue
        found, said = _runs_below(top)
        runs, notes = runs + found, notes + said
        if not found and not said:
            notes.append(f"{given}: there is no run of `ocvtp train` in it")
    if not runs:
        raise ValueError(
            f"{'; '.join(notes)}. Pass the --output folders of runs, or a folder of such folders."
        )
    names = [run.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            run.name = f"{run.folder.parent.name}/{name}"
    return runs, notes


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, with the value of each, None without one."""
    told = [run for run in runs if run.settings]
    names = dict.fromkeys(name for run in told for name in run.settings)
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    return {
        name: values
        for name, values in found.items()
        if len({repr(run.settings.get(name)) for run in told}) > 1
    }


def figures_of(runs: Iterable[Run]) -> list[str]:
    """Names of the validation's figures that any run has."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    return [name for name in names if name.startswith("val/")]


def _runs_below(top: Path) -> tuple[list[Run], list[str]]:
    """By folder of logs: `csv/version_N`, or one that holds `config.yaml` alone."""
    files = sorted((*top.rglob("metrics.csv"), *top.rglob("config.yaml")), key=_in_order)
    versions: dict[Path, list[Path]] = {}
    for place in dict.fromkeys(file.parent for file in files):
        is_version = re.fullmatch(r"version_\d+", place.name) is not None
        versions.setdefault(place.parent if is_version else place, []).append(place)
    runs, notes = list[Run](), list[str]()
    for logs, places in versions.items():
        folder = logs.parent if logs.name in ("csv", "tensorboard") else logs
        name = folder.relative_to(top).as_posix() if folder.is_relative_to(top) else "."
        own: list[Run] = []
        for place in places:
            run = _read(place, folder, folder.resolve().name if name == "." else name)
            if not run.settings and not run.curves:
                notes += [f"{place}: {note}" for note in run.notes]
            elif own and _continues(own[-1], run):
                _append(own[-1], run)
            else:
                run.name += f":{place.name}" if own else ""
                own.append(run)
        runs += own
    return runs, notes


def _in_order(file: Path) -> tuple[str, int]:
    number = re.fullmatch(r"version_(\d+)", file.parent.name)
    return (str(file.parent.parent), int(number[1])) if number else (str(file.parent), -1)


def _read(place: Path, folder: Path, name: str) -> Run:
    run = Run(name, folder)
    config, metrics = place / "config.yaml", place / "metrics.csv"
    if config.is_file():
        _read_settings(config, run)
    if metrics.is_file():
        _read_curves(metrics, run)
    elif run.settings:
        run.notes.append("nothing was logged yet")
    run.checkpoints = sorted(path.name for path in folder.glob("checkpoints/*.ckpt"))
    return run


def _read_settings(path: Path, run: Run) -> None:
    try:
        if path.stat().st_size > _MOST:
            raise ValueError("it is too large for settings")
        content = read_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        run.notes.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:120]}")
        return
    if not isinstance(content, Mapping) or not {"model", "trainer"} <= content.keys():
        run.notes.append(f"{path.name} is not of `ocvtp train`")
        return
    run.resumed = content.get("resume") is not None
    run.settings = dict(_flat("", content))


def _flat(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Settings by their dotted names, without where files are."""
    if name.rpartition(".")[2] in _PLACES or name in _PLAIN:
        return
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            own = name if key == "init_args" else f"{name}.{key}".removeprefix(".")
            yield from _flat(own, inner)
    elif name:
        yield name, value


def _read_curves(path: Path, run: Run) -> None:
    curves: dict[str, dict[int, float]] = {}
    unread = 0
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(line for line in file if "\0" not in line)
        if "step" not in (reader.fieldnames or ()):
            run.notes.append(f"{path.name} is no log of a run: it has no steps")
            return
        for row in reader:
            values = {k: v for k, v in row.items() if k and v and k not in ("step", "epoch")}
            try:
                step = int(row["step"] or "")
                numbers = {name: float(value) for name, value in values.items()}
            except (ValueError, TypeError):
                unread += 1
                continue
            for name, number in numbers.items():
                if math.isfinite(number):
                    curves.setdefault(name, {})[step] = number
    run.curves = {name: sorted(points.items()) for name, points in curves.items()}
    if unread:
        run.notes.append(f"{unread} lines of {path.name} cannot be read")
    if not curves:
        run.notes.append("nothing was logged yet")


def _continues(run: Run, later: Run) -> bool:
    """Whether the later one goes on from steps of the other: it was told to, or SLURM ran it again.

    One that started over would be logged first where the other was.
    """
    firsts = [min((p[0][0] for p in one.curves.values() if p), default=-1) for one in (run, later)]
    if -1 in firsts:
        return False
    alike = [{k: v for k, v in one.settings.items() if k not in _LENGTHS} for one in (run, later)]
    return later.resumed or (firsts[1] > firsts[0] and alike[0] == alike[1])


def _append(run: Run, later: Run) -> None:
    """Curves of a run with those of the one that continued it, which count from their step."""
    first = min(points[0][0] for points in later.curves.values() if points)
    for name in {**run.curves, **later.curves}:
        before = [point for point in run.curves.get(name, []) if point[0] < first]
        run.curves[name] = before + later.curves.get(name, [])
    run.settings = later.settings or run.settings
    run.notes += [note for note in later.notes if note not in run.notes]
