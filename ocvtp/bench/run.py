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

from ocvtp.bench import timeline
from ocvtp.bench.measure import Bench
from ocvtp.bench.samples import KIND, SCHEMA
from ocvtp.bench.sittings import Sittings, cells_in, chosen, names_of_kept
from ocvtp.bench.variants import Variant, flops_of, lacking_network, network_for, variants
from ocvtp.bench.workload import Cell, make_request, tokens_of
from ocvtp.choices import SavingRows
from ocvtp.evaluation.conditions import content_hash
from ocvtp.evaluation.runner import Subject
from ocvtp.hosts.prompt.checks import refuse_beyond_all
from ocvtp.hosts.registry import find_host
from ocvtp.pruners.budgets import check_count
from ocvtp.reporting.command_line import as_typed
from ocvtp.reporting.environment import environment_of
from ocvtp.reporting.progress import progress_bar
from ocvtp.reporting.results_files import refuse_another

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
        checkpoint: exported network, for pruners that take one; None for random weights.
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
        if min(self.image_size) < 1:
            raise ValueError(f"image_size={self.image_size}; pass a width and a height above 0.")
        object.__setattr__(self, "num_keep", [check_count("num_keep", k) for k in self.num_keep])

    def settings(self) -> dict[str, Any]:
        """All but the cells, as JSON."""
        found = {name: value for name, value in asdict(self).items() if name != "cells"}
        if self.checkpoint is not None:
            found["weights"] = content_hash(self.checkpoint)
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain


def bench(subject: Subject, plan: Plan, folder: Path, command: str = "") -> dict[str, Any]:
    """Time all rows that `folder` does not hold yet.

    Args:
        subject: the model.
        plan: what is timed.
        folder: where cells are kept.
        command: what to type for the same, for the report.

    Returns:
        what results.json holds: all that is in the folder.

    Raises:
        ValueError: if a pruner does not fit the model, or `folder` holds cells that were timed
            under other settings.
    """
    model = subject.model
    shared = {"model": subject.name, "weights": content_hash(subject.name), **plan.settings()}
    environment = environment_of(model)
    shared |= {key: environment[key] for key in ("device", "threads", "dtype")}
    shared["attention"] = attention_of(model)
    done = []
    refuse_another(folder, KIND)
    cells_in(folder / CELLS, shared)  # refuses those of other settings before anything is timed
    with progress_bar() as progress:
        bar = progress.add_task("", total=None)
        for number, cell in enumerate(plan.cells):
            sittings = Sittings(folder / CELLS, cell.key, shared | asdict(cell))
            tick = partial(_tick, progress, bar, f"{number + 1} of {len(plan.cells)}: {cell}")
            asked = _sit(subject, plan, cell, sittings, tick, command)
            done.append((cell.key, asked))
    cells = cells_in(folder / CELLS, shared)
    order = [key for key, _ in done]
    cells.sort(key=lambda one: order.index(one.key) if one.key in order else len(order))
    kept = names_of_kept(cells, dict(done))
    typed = dict.fromkeys(f.get("command") for one in cells for f in one.found)
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "model": subject.name,
        "command": command,
        "earlier_commands": [one for one in typed if one and one != command],
        "remarks": [f"kept from earlier runs in this folder: {'; '.join(kept)}."] if kept else [],
        "settings": shared | chosen(cells),
        "environment": environment | {"timer_seconds": timeline.cost_of_a_mark(_device(model))},
        "cells": [one.cell(plan.new_tokens) for one in cells],
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


def _sit(
    subject: Subject,
    plan: Plan,
    cell: Cell,
    sittings: Sittings,
    tick: Callable[..., None],
    command: str,
) -> set[str]:
    """Time what a cell lacks of the plan; returns the keys of the plan's rows."""
    if (same := sittings.same()) is not None:
        return {row["key"] for row in same["rows"]}
    timer = Bench(subject, plan.new_tokens)
    request = make_request(cell, subject.processor, plan.image_size)
    inputs = request.prepare(subject.processor, subject.model)
    sizes = tokens_of(timer.host, inputs)
    bare, *asked = _variants(subject, plan, inputs, sizes["image_tokens"] // cell.images_per_prompt)
    keys = {bare.key, *(variant.key for variant in asked)}
    tried = sittings.tried(plan.skip_unfit)
    rows = [bare, *(variant for variant in asked if variant.key not in tried)]
    if len(rows) == 1 and sittings.found:
        return keys
    tick("a first look", total=len(rows) * (1 + plan.warmup + plan.repetitions))
    seen, unfit = _first_look(timer, rows, inputs, tick)
    if unfit and not plan.skip_unfit:
        lines = "".join(f"\n  {key}: {why}" for key, why in unfit.items())
        raise ValueError(
            f"these cannot run on {subject.name}; leave them out, or pass --skip-unfit for a report"
            f" without them:{lines}"
        )
    known = {**sittings.rows(), **seen}
    fit = [variant for variant in rows if variant.key in seen and _has_effect(variant, known)]
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
    idle = [key for key in seen if key not in samples]
    facts = {"command": command, "sizes": sizes, "unfit": unfit, "without_effect": idle}
    sittings.add({**facts, "rows": found})
    return keys


def _variants(subject: Subject, plan: Plan, inputs: Any, num_tokens: int) -> list[Variant]:
    lacking = lacking_network(plan.pruners, plan.checkpoint)
    return variants(
        plan.pruners,
        plan.num_keep,
        num_tokens,
        checkpoint=plan.checkpoint,
        network={name: network_for(subject, inputs, name) for name in sorted(lacking)},
        rows=plan.savings,
    )


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
            unfit[variant.key] = as_typed(str(error))
        tick(variant.key)
    return seen, unfit


def _tick(progress: Progress, bar: Any, where: str, row: str, total: int | None = None) -> None:
    """A row has run; or a cell of `total` runs begins."""
    if total is not None:
        progress.reset(bar, total=total)
    progress.update(bar, advance=int(total is None), description=f"cell {where}; {row}")


def _has_effect(variant: Variant, seen: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a row with one setting reversed differs from the row without."""
    if not variant.changed.startswith(("with ", "without ")):
        return True
    plain = variant.key.removesuffix(f" [{variant.changed}]")
    return plain in seen and seen[plain]["savings"] != seen[variant.key]["savings"]


def _device(model: Any) -> torch.device:
    return torch.device(model.device)
