"""`explore`: every image under every pruner and budget, as the facts of a page.

The first pruner is `unpruned`: all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ocvtp.evaluation.conditions import (
    Budget,
    Condition,
    Place,
    pruner_conditions,
    unpruned_conditions,
)
from ocvtp.evaluation.labels import UNPRUNED
from ocvtp.explore import page
from ocvtp.explore.views import AnyPruner, Tick, View
from ocvtp.images import open_image
from ocvtp.pruners import Compose, Pruner
from ocvtp.reporting.command_line import as_typed
from ocvtp.reporting.progress import progress_bar

SCHEMA = 1


@dataclass(frozen=True)
class Wanted:
    """What is to be shown.

    Args:
        pruners: specs.
        budgets: of each.
        checkpoints: exported networks, for pruners that take one.
        skip_unfit: whether what cannot run is left out, with a note.
    """

    pruners: Sequence[str]
    budgets: Sequence[Budget]
    checkpoints: Sequence[str] = ()
    skip_unfit: bool = False


@dataclass(frozen=True, eq=False)
class _Row:
    """A pruner at a budget."""

    condition: Condition
    pruner: AnyPruner

    @property
    def label(self) -> str:
        """Of the pruner; of one with several checkpoints, with the number of its own."""
        number = self.condition.seed
        return self.condition.label + (f" #{number + 1}" if number else "")

    @property
    def key(self) -> str:
        """Names it among the others."""
        budget = self.condition.budget
        return self.label if budget is None else f"{self.label} @ {budget}"


def explore(
    view: View, wanted: Wanted, files: Sequence[Path], sizes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Look at images under all pruners and budgets.

    Args:
        view: the model, or the tower.
        wanted: what is to be shown.
        files: of the images. sizes: their widths and heights.

    Returns:
        the facts of the page, JSON: `pruners`, `budgets` (small to large), `conditions` (a pruner
        at a budget, by their numbers), `images` with their `looks` (see `page.look`, each once) and
        `runs` (of each prompt and condition `look`, `answer` and `times`, see `Run`), `unfit`.

    Raises:
        ValueError: if an image cannot be read, or a pruner cannot run.
    """
    first = open_image(files[0])
    budgets = sorted(dict.fromkeys(wanted.budgets), key=lambda budget: budget.count(10**6))
    view.check(sizes)
    rows = _rows(wanted, budgets, view.num_tokens(first))
    view.prepare([row.pruner for row in rows])
    images: list[dict[str, Any]] = []
    with progress_bar() as progress:
        per_image = max(1, len(view.prompts))
        steps = len(rows) * (1 + per_image * len(files))
        bar = progress.add_task("trying", total=steps)

        def tick() -> None:
            progress.advance(bar)

        unfit = _tried(view, rows, first, tick)
        nothing_left = rows[0].key in unfit or len(unfit) + 1 == len(rows) > 1
        if nothing_left or (unfit and not wanted.skip_unfit):
            _refuse(unfit, view.name, nothing_left)
        rows = [row for row in rows if row.key not in unfit]
        progress.update(bar, total=steps - len(unfit) * per_image * len(files))
        for path, name in zip(files, _names(files), strict=True):
            progress.update(bar, description=name)
            images.append({"name": name, **_image(view, rows, open_image(path), tick)})
    labels = list(dict.fromkeys(row.label for row in rows))
    notes = {row.label: _note(view, row) for row in rows}
    return {
        "schema": SCHEMA,
        "kind": view.kind,
        "model": view.name,
        "device": str(view.device),
        "prompts": list(view.prompts),
        "budgets": [str(budget) for budget in budgets],
        "pruners": [{"label": label, "note": notes[label]} for label in labels],
        "conditions": [_facts(row, labels, budgets) for row in rows],
        "images": images,
        "palette": page.palette([look for image in images for look in image["looks"]]),
        "time": view.time,
        "timed": view.timed,
        "unfit": [{"name": name, "why": why} for name, why in unfit.items()],
    }


def _rows(wanted: Wanted, budgets: Sequence[Budget], num_tokens: int) -> list[_Row]:
    found = unpruned_conditions()[:1]
    for spec in dict.fromkeys(wanted.pruners):
        if spec != UNPRUNED:
            found += pruner_conditions(spec, budgets, [0], wanted.checkpoints, num_tokens)
    return [_Row(condition, _whole(condition.make(Place(0, list)))) for condition in found]


def _note(view: View, row: _Row) -> str:
    """What a reader must know, and which of the exported networks it is."""
    path = row.condition.settings.get("checkpoint")
    notes = [view.note(row.pruner), f"network: {path}" if path else ""]
    if any(part.merging and part.stage == "encoder" for part in row.pruner.parts):
        notes.append("merges inside the tower, and what goes into what is not told")
    return "; ".join(filter(None, notes))


def _whole(pruner: Pruner) -> AnyPruner:
    """With parts that are the same objects whenever they are asked for."""
    return Compose([pruner]) if len(pruner.parts) > 1 else pruner


def _tried(view: View, rows: Sequence[_Row], image: Image.Image, tick: Tick) -> dict[str, str]:
    """Why pruners cannot run, by `_Row.key`."""
    unfit = {}
    for row in rows:
        try:
            view.attempt(row.pruner, image)
        except ValueError as error:
            unfit[row.key] = as_typed(str(error))
        tick()
    return unfit


def _refuse(unfit: Mapping[str, str], name: str, nothing_left: bool) -> None:
    lines = "".join(f"\n  {key}: {why}" for key, why in unfit.items())
    advice = "leave them out, or pass --skip-unfit for a page that says so"
    if nothing_left:
        advice = "nothing is left to show without them: pass others, or other budgets"
    raise ValueError(f"these cannot run on {name}; {advice}:{lines}")


def _image(view: View, rows: Sequence[_Row], image: Image.Image, tick: Tick) -> dict[str, Any]:
    seen, found = view.look([row.pruner for row in rows], image, tick)
    looks: list[Any] = []
    runs: list[list[dict[str, Any]]] = []
    for of_prompt in found:
        runs.append([])
        for run in of_prompt:
            look = page.look(run.stages)
            if look not in looks:
                looks.append(look)
            times = {name: float(f"{value:.4g}") for name, value in run.times.items()}
            runs[-1].append({"look": looks.index(look), "answer": run.answer, "times": times})
    return {**page.picture(seen), "looks": looks, "runs": runs}


def _facts(row: _Row, labels: Sequence[str], budgets: Sequence[Budget]) -> dict[str, Any]:
    budget = row.condition.budget
    number = None if budget is None else budgets.index(budget)
    return {"pruner": labels.index(row.label), "budget": number}


def _names(files: Sequence[Path]) -> list[str]:
    """Names of files; of those that share one, with their folders."""
    names = [path.name for path in files]
    return [path.name if names.count(path.name) == 1 else str(path) for path in files]
