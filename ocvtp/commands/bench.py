"""`ocvtp bench`: time and memory of pruners, side by side with the bare model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ocvtp.bench import report
from ocvtp.bench.plots import NOTHING_IN_COMMON
from ocvtp.bench.run import CELLS, Plan, bench
from ocvtp.bench.workload import grid
from ocvtp.commands import output
from ocvtp.commands.flags import bench as add_arguments
from ocvtp.evaluation.conditions import check_specs
from ocvtp.evaluation.runner import Subject
from ocvtp.hosts.loading import check_model, empty_model, load_model
from ocvtp.pruners.budgets import budgets_of
from ocvtp.reporting.folder_lock import claimed
from ocvtp.reporting.results_files import read_values

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Time, write and print."""
    folder = output.folder(arguments.output)
    plan = Plan(
        pruners=arguments.pruners,
        num_keep=arguments.num_keep,
        cells=grid(arguments.batch_size, arguments.text_length, arguments.images_per_prompt),
        new_tokens=arguments.new_tokens,
        warmup=arguments.warmup,
        repetitions=arguments.repetitions,
        image_size=tuple(arguments.image_size),
        savings=arguments.savings,
        checkpoint=arguments.checkpoint,
        skip_unfit=arguments.skip_unfit,
    )
    checkpoints = [] if plan.checkpoint is None else [plan.checkpoint]
    pruners = check_specs(plan.pruners, budgets_of(plan.num_keep), checkpoints, untrained=True)
    name = arguments.model or f"random:{arguments.random_weights}"
    place, text_tower = (name, arguments.dtype, arguments.device), arguments.text_tower
    check_model(*place, () if plan.skip_unfit else pruners, text_tower)
    if arguments.attention is not None:  # refused before the weights are loaded
        _set_attention(empty_model(name), arguments.attention)
    accuracy = None if arguments.accuracy is None else _accuracy(arguments.accuracy, plan, folder)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads {arguments.threads}; pass at least 1.")
        torch.set_num_threads(arguments.threads)
    with claimed(folder, "ocvtp bench"):
        model, processor = load_model(*place)
        _set_attention(model, arguments.attention)
        subject = Subject(model, processor, name, text_tower)
        found = bench(subject, plan, folder, output.command(arguments))
        paths = report.write(found, folder, accuracy)
    wrote = ", ".join(str(path) for path in paths)
    output.emit(found, f"{report.short(found)}\nwrote {wrote}", arguments.json)
    return 0


def _set_attention(model: Any, name: str | None) -> None:
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"--attention {name} cannot be had ({error}); pass sdpa or eager, or leave it out."
        ) from error


def _accuracy(path: str, plan: Plan, folder: Path) -> dict[str, Any]:
    try:
        found = read_values(path)
    except ValueError as error:
        raise ValueError(f"--accuracy {error}") from error
    timed = {(spec, count) for spec in plan.pruners for count in (*plan.num_keep, None)}
    known = {(row["label"], row["num_keep"]) for row in found["rows"]}
    if not timed & known and not (folder / CELLS).is_dir():
        raise ValueError(f"--accuracy {path}: {NOTHING_IN_COMMON}")
    return found
