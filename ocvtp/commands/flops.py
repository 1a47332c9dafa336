"""`ocvtp flops`: operations of a prompt, by three conventions, with any pruner."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ocvtp.commands import output
from ocvtp.evaluation.conditions import check_asked
from ocvtp.flops import Count, count
from ocvtp.flops.count import NOTHING_SAVED
from ocvtp.flops.report import ANY, KIND, UNPRUNED, Key, bars, results, to_markdown
from ocvtp.flops.sizes import Sizes, sizes_of
from ocvtp.hosts.loading import load_config
from ocvtp.pruners.budgets import budgets_of
from ocvtp.pruners.specs import build_spec, runs_once
from ocvtp.reporting.command_line import as_typed
from ocvtp.reporting.figure_files import save_figure
from ocvtp.reporting.files import replacing
from ocvtp.reporting.results_files import RESULTS, refuse_another


def run(arguments: argparse.Namespace) -> int:
    """Count, write and print."""
    checkpoints = [] if arguments.checkpoint is None else [arguments.checkpoint]
    check_asked(arguments.pruners, budgets_of(arguments.num_keep), checkpoints)
    folder = None if arguments.output is None else output.folder(arguments.output)
    if folder is not None:
        refuse_another(folder, KIND)
    sizes = sizes_of(load_config(arguments.model))
    shared = {
        "num_visual": arguments.num_visual,
        "text_length": arguments.text_length,
        "num_images": arguments.images,
        "num_newlines": arguments.newlines,
    }
    whole = count(sizes, **shared)
    per_image = whole.visual[0] // arguments.images - arguments.newlines
    if beyond := [k for k in arguments.num_keep if not 1 <= k <= per_image]:
        raise ValueError(f"--num-keep {beyond[0]}; pass 1 to the {per_image} tokens of an image.")
    counts: dict[Key, Count] = {(UNPRUNED, per_image): whole}
    notes: list[str] = []
    for k in [*dict.fromkeys(arguments.num_keep), None]:
        if arguments.pruners:
            notes += _count_pruners(counts, sizes, k, arguments, shared)
        elif k is not None and k < per_image:
            counts[ANY, k] = count(sizes, num_keep=k, **shared)
    if arguments.pruners and len(counts) == 1:
        raise ValueError(f"nothing could be counted: {' '.join(notes)}")
    settings = shared | {"num_visual": per_image, "savings": not arguments.whole_tower}
    facts = results(arguments.model, settings, counts, notes)
    text = to_markdown(facts)
    if folder is not None:
        written = ", ".join(map(str, _write(facts, text, folder)))
        text += f"\nwrote {written}"
    output.emit(facts, text.rstrip(), arguments.json)
    return 0


def _count_pruners(
    counts: dict[Key, Count],
    sizes: Sizes,
    k: int | None,
    arguments: argparse.Namespace,
    shared: dict[str, Any],
) -> Sequence[str]:
    """Add the counts of pruners at one budget; returns what could not be counted, and why.

    Those that have a budget of their own are counted at that alone: where k is None.
    """
    notes = []
    savings = NOTHING_SAVED if arguments.whole_tower else None
    for spec in arguments.pruners:
        if runs_once(spec, bool(arguments.num_keep)) != (k is None):
            continue
        try:
            pruner = build_spec(spec, num_keep=k, checkpoint=arguments.checkpoint)
            counts[spec, k] = count(sizes, pruner=pruner, savings=savings, **shared)
        except ValueError as error:
            where = "" if k is None else f" at K={k}"
            notes.append(f"`{spec}`{where}: {as_typed(str(error))}")
    return notes


def _write(facts: dict[str, Any], text: str, folder: Path) -> list[Path]:
    """Write results.json, report.md and flops.png, each whole or not at all."""
    paths = [folder / RESULTS, folder / "report.md"]
    for path, content in zip(paths, (json.dumps(facts, indent=1) + "\n", text), strict=True):
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return [*paths, save_figure(bars(facts), folder / "flops.png", dpi=120)]
