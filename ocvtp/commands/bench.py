"""`ocvtp bench`: time and memory of pruners, side by side with the bare model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import torch

from ocvtp.bench import report
from ocvtp.bench.plots import NOTHING_IN_COMMON
from ocvtp.bench.run import CELLS, Plan, bench
from ocvtp.bench.variants import SavingRows
from ocvtp.bench.workload import grid
from ocvtp.commands import options, output
from ocvtp.evaluation.reading import read_values
from ocvtp.evaluation.runner import Subject
from ocvtp.hosts.full_size import FULL_SIZE_MODELS
from ocvtp.hosts.loading import RANDOM_MODELS, load_model
from ocvtp.pruners.specs import known_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", help="folder or hub id of a VLM; tiny random ones: " + ", ".join(RANDOM_MODELS)
    )
    model.add_argument(
        "--random-weights",
        choices=FULL_SIZE_MODELS,
        help="a model of real size with random weights, which has true times; no download",
    )
    _add_place(parser)
    parser.add_argument(
        "--pruners",
        nargs="+",
        required=True,
        metavar="NAME[:KEY=VALUE,...]",
        help="see `ocvtp list`; a K in settings stands for --num-keep",
    )
    parser.add_argument("--num-keep", type=int, nargs="+", required=True, help="tokens of an image")
    parser.add_argument(
        "--checkpoint", help="exported OC-pruner; without one, `ocvtp` runs on random weights"
    )
    options.add_text_tower(parser)
    _add_sizes(parser)
    parser.add_argument(
        "--savings",
        choices=get_args(SavingRows),
        default="default",
        help="what hosts leave out: attach's own settings, all, none, or a row beside its own for"
        " `each` setting turned round",
    )
    parser.add_argument(
        "--skip-unfit",
        action="store_true",
        help="leave out what cannot run on this model, with a note, instead of stopping",
    )
    parser.add_argument(
        "--accuracy",
        metavar="FILE",
        help="results.json of `ocvtp evaluate` with the same pruners and budgets, to be drawn"
        " against the time to the first token",
    )
    parser.add_argument(
        "--output",
        default="outputs/bench",
        help="folder of results.json, report.md, plots and cells; the same command continues what"
        " it holds, another one of the same model adds to it (default: %(default)s)",
    )
    output.add_json(parser)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="e.g. cpu, cuda (default: %(default)s)")
    parser.add_argument("--attention", help="e.g. sdpa, eager, flash_attention_2; default: its own")
    parser.add_argument("--threads", type=int, help="of a CPU; default: PyTorch's own choice")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    sizes = parser.add_argument_group("sizes; lists make a grid of cells")
    sizes.add_argument("--batch-size", type=int, nargs="+", default=[1], help="default: 1")
    sizes.add_argument(
        "--text-length", type=int, nargs="+", default=[64], help="text tokens; default: 64"
    )
    sizes.add_argument("--images-per-prompt", type=int, nargs="+", default=[1], help="default: 1")
    sizes.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        default=[672, 672],
        metavar=("WIDTH", "HEIGHT"),
        help="pixels of the pictures before preprocessing (default: 672 672)",
    )
    sizes.add_argument("--new-tokens", type=int, default=16, help="of an answer (default: 16)")
    sizes.add_argument("--warmup", type=int, default=10, help="rounds (default: 10)")
    sizes.add_argument("--repetitions", type=int, default=50, help="rounds (default: 50)")


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
    for spec in arguments.pruners:
        known_settings(spec)  # refuses what is unknown before anything is loaded
    accuracy = None if arguments.accuracy is None else _accuracy(arguments.accuracy, plan, folder)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads {arguments.threads}; pass at least 1.")
        torch.set_num_threads(arguments.threads)
    found = bench(_subject(arguments), plan, folder, output.command(arguments))
    paths = report.write(found, folder, accuracy)
    wrote = ", ".join(str(path) for path in paths)
    output.emit(found, f"{report.short(found)}\nwrote {wrote}", arguments.json)
    return 0


def _subject(arguments: argparse.Namespace) -> Subject:
    name = arguments.model or f"random:{arguments.random_weights}"
    model, processor = load_model(name, arguments.dtype, arguments.device)
    if arguments.attention is not None:
        try:
            model.set_attn_implementation(arguments.attention)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"--attention {arguments.attention} cannot be had ({error}); pass sdpa or eager, or"
                " leave it out."
            ) from error
    return Subject(model, processor, name, arguments.text_tower)


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
