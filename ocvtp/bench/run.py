"""`bench`: a model, pruners, budgets and a grid of sizes in; results.json out.

Every cell is written down when it is done, so that a run that was stopped goes on with the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ocvtp.bench import figures, marks
from ocvtp.bench.counts import flops_of
from ocvtp.bench.measure import Bench
from ocvtp.bench.variants import SavingRows, Variant, needs_network, network_for, variants
from ocvtp.bench.workload import Cell, make_request, tokens_of
from ocvtp.evaluation.conditions import content_hash
from ocvtp.evaluation.environment import environment_of
from ocvtp.evaluation.runner import Subject
from ocvtp.files import replacing
from ocvtp.hosts.attach import find_host
from ocvtp.hosts.checks import refuse_beyond_all
from ocvtp.progress import progress_bar

SCHEMA = 1
KIND = "ocvtp bench"
CELLS = "cells"


@dataclass(frozen=True)
class Plan:
    """What is timed.

    Args:
        pruners: specs, see `build_spec`. num_keep: budgets of all that take one.
        cells: see `ocvtp.bench.workload.grid`.
        new_tokens: of every answer.
        warmup: rounds before those that count. repetitions: rounds that count.
        image_size: width and height of the pictures.
        savings: see `variants`.
        checkpoint: exported OC-pruner, for pruners that take one; None for random weights.
        skip_unfit: whether what cannot run is left out, with a note.
    """

    pruners: Sequence[str]
    num_keep: Sequence[int]
    cells: Sequence[Cell]
    new_tokens: int = 16
    warmup: int = 10
    repetitions: int = 50
    image_size: tuple[int, int] = (672, 672)
    savings: SavingRows = "default"
    checkpoint: str | None = None
    skip_unfit: bool = False

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 2), ("warmup", 0), ("repetitions", 5)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}={value}; pass at least {least}.")

    def settings(self) -> dict[str, Any]:
        """All but the cells, as JSON."""
        found = {name: value for name, value in asdict(self).items() if name != "cells"}
        if self.checkpoint is not None:
            found["weights"] = content_hash(self.checkpoint)
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain


def bench(subject: Subject, plan: Plan, folder: Path, command: str = "") -> dict[str, Any]:
    """Time all cells that `folder` does not hold yet.

    Args:
        subject: the model.
        plan: what is timed.
        folder: where cells are kept.
        command: what to type for the same, for the report.

    Returns:
        what results.json holds.

    Raises:
        ValueError: if a pruner does not fit the model, or `folder` holds cells of another plan.
    """
    model = subject.model
    shared = {"model": subject.name, "weights": content_hash(subject.name), **plan.settings()}
    environment = environment_of(model)
    shared |= {key: environment[key] for key in ("device", "threads", "dtype")}
    shared["attention"] = attention_of(model)
    cells = []
    with progress_bar() as progress:
        bar = progress.add_task("", total=None)
        for number, cell in enumerate(plan.cells):
            path = folder / CELLS / f"{cell.key}.json"
            header = shared | asdict(cell)
            found = _written(path, header)
            if found is None:
                tick = partial(_tick, progress, bar, f"{number + 1} of {len(plan.cells)}: {cell}")
                found = {"header": header, **_measure(subject, plan, cell, tick)}
                with replacing(path) as temporary:
                    temporary.write_text(json.dumps(found) + "\n")
            cells.append(found)
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "model": subject.name,
        "command": command,
        "settings": shared,
        "environment": environment | {"timer_seconds": marks.cost_of_a_mark(_device(model))},
        "cells": [figures.cell(found, plan.new_tokens) for found in cells],
    }


def attention_of(model: Any) -> dict[str, Any]:
    """The attention implementation of every kind of module, and what `sdpa` may use."""
    host = find_host(model)
    backends = torch.backends.cuda
    allowed = {
        "flash": backends.flash_sdp_enabled(),
        "memory efficient": backends.mem_efficient_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }
    configs: dict[str, Any] = {
        "tower": host.tower.config,
        "language_model": host.language_model.config,
    }
    found = {name: config._attn_implementation for name, config in configs.items()}
    return found | {"sdpa_backends": [name for name, on in allowed.items() if on]}


def _measure(subject: Subject, plan: Plan, cell: Cell, tick: Callable[..., None]) -> dict[str, Any]:
    """What is found of a cell, raw."""
    timer = Bench(subject, plan.new_tokens)
    request = make_request(cell, subject.processor, plan.image_size)
    inputs = request.prepare(subject.processor, subject.model)
    sizes = tokens_of(timer.host, inputs)
    lacks = needs_network(plan.pruners, plan.checkpoint)
    rows = variants(
        plan.pruners,
        plan.num_keep,
        sizes["image_tokens"] // cell.images_per_prompt,
        checkpoint=plan.checkpoint,
        network=network_for(subject, inputs) if lacks else None,
        rows=plan.savings,
    )
    tick("a first look", total=len(rows) * (1 + plan.warmup + plan.repetitions))
    seen, unfit = _first_look(timer, rows, inputs, tick)
    if unfit and not plan.skip_unfit:
        lines = "".join(f"\n  {key}: {why}" for key, why in unfit.items())
        raise ValueError(
            f"these cannot run on {subject.name}; leave them out, or pass --skip-unfit for a report"
            f" without them:{lines}"
        )
    fit = [variant for variant in rows if variant.key in seen and _has_effect(variant, seen)]
    samples = timer.rounds(request, fit, plan.warmup, plan.repetitions, tick)
    found = [
        {
            **variant.facts(),
            **seen[variant.key],
            "flops": flops_of(subject.model, variant, sizes, cell.images_per_prompt),
            "samples": samples[variant.key],
        }
        for variant in fit
    ]
    return {"sizes": sizes, "unfit": unfit, "rows": found}


def _first_look(
    timer: Bench, rows: Sequence[Variant], inputs: Any, tick: Callable[..., None]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What every row does, by its key; and why it does not run, where it does not."""
    seen: dict[str, dict[str, Any]] = {}
    unfit: dict[str, str] = {}
    for variant in rows:
        try:
            if variant.pruner is not None:
                refuse_beyond_all(timer.host, variant.pruner)
            seen[variant.key] = timer.look(variant, inputs)
        except ValueError as error:
            unfit[variant.key] = str(error)
        tick(variant.key)
    return seen, unfit


def _tick(progress: Progress, bar: Any, where: str, row: str, total: int | None = None) -> None:
    """A row has run; or a cell of `total` runs begins."""
    if total is not None:
        progress.reset(bar, total=total)
    progress.update(bar, advance=int(total is None), description=f"cell {where}; {row}")


def _has_effect(variant: Variant, seen: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a row of a setting turned round differs from the row without."""
    if not variant.changed.startswith(("with ", "without ")):
        return True
    plain = variant.key.removesuffix(f" [{variant.changed}]")
    return plain in seen and seen[plain]["savings"] != seen[variant.key]["savings"]


def _written(path: Path, header: Mapping[str, Any]) -> dict[str, Any] | None:
    """A cell that an earlier run has done."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    if found["header"] != header:
        differ = sorted(
            k for k in {*header, *found["header"]} if header.get(k) != found["header"].get(k)
        )
        raise ValueError(
            f"{path} was timed under other settings ({', '.join(differ)}); pass another --output,"
            " or delete that file."
        )
    return found


def _device(model: Any) -> torch.device:
    return torch.device(model.device)
