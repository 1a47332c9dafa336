"""`ocvtp flops`: operations of a prompt, by three conventions, with any pruner."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ocvtp.commands import output
from ocvtp.files import replacing
from ocvtp.flops import Count, count
from ocvtp.flops.count import NOTHING_SAVED
from ocvtp.flops.report import ANY, UNPRUNED, bars, results, to_markdown
from ocvtp.hosts.full_size import FULL_SIZE_MODELS
from ocvtp.hosts.loading import load_config
from ocvtp.pruners.specs import build_spec, known_settings
from ocvtp.visualize import save_figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument(
        "--model",
        required=True,
        help="folder or hub id of a VLM, of which only the configuration is read; or "
        + ", ".join(FULL_SIZE_MODELS),
    )
    parser.add_argument(
        "--num-keep", type=int, nargs="+", required=True, help="visual tokens kept per image"
    )
    parser.add_argument(
        "--pruners",
        nargs="+",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="see `ocvtp list`; without any, the model with so many tokens, whoever chooses them",
    )
    parser.add_argument("--checkpoint", help="exported OC-pruner, for pruners that take one")
    parser.add_argument(
        "--text-length",
        type=int,
        default=32,
        help="tokens of the prompt that are no visual ones (default: %(default)s)",
    )
    parser.add_argument(
        "--num-visual",
        type=int,
        help="visual tokens of an image before pruning (default: all of a model with one number,"
        " 2880 of LLaVA-NeXT, 576 of Qwen2.5-VL)",
    )
    parser.add_argument("--images", type=int, default=1, help="of the prompt (default: 1)")
    parser.add_argument(
        "--newlines",
        type=int,
        default=0,
        help="tokens that end the rows of an image, which no published figure counts: 48 of"
        " LLaVA-NeXT's 2880 (default: 0)",
    )
    parser.add_argument(
        "--whole-tower",
        action="store_true",
        help="count the tower and the projector as they run without savings: all blocks, all rows",
    )
    parser.add_argument("--output", help="folder of results.json, report.md and flops.png")
    output.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Count, write and print."""
    for spec in arguments.pruners:
        known_settings(spec)  # refuses what is unknown before anything is counted
    folder = None if arguments.output is None else output.folder(arguments.output)
    config = load_config(arguments.model)
    shared = {
        "num_visual": arguments.num_visual,
        "text_length": arguments.text_length,
        "num_images": arguments.images,
        "num_newlines": arguments.newlines,
    }
    whole = count(config, **shared)
    per_image = whole.visual[0] // arguments.images - arguments.newlines
    if beyond := [k for k in arguments.num_keep if not 1 <= k <= per_image]:
        raise ValueError(f"--num-keep {beyond[0]}; pass 1 to the {per_image} tokens of an image.")
    counts, notes = {(UNPRUNED, per_image): whole}, list[str]()
    for k in dict.fromkeys(arguments.num_keep):
        if arguments.pruners:
            notes += _count_pruners(counts, config, k, arguments, shared)
        elif k < per_image:
            counts[ANY, k] = count(config, num_keep=k, **shared)
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
    counts: dict[tuple[str, int], Count],
    config: Any,
    k: int,
    arguments: argparse.Namespace,
    shared: dict[str, Any],
) -> Sequence[str]:
    """Add the counts of all pruners at one budget; returns what could not be counted, and why."""
    notes = []
    savings = NOTHING_SAVED if arguments.whole_tower else None
    for spec in arguments.pruners:
        try:
            pruner = build_spec(spec, num_keep=k, checkpoint=arguments.checkpoint)
            counts[spec, k] = count(config, pruner=pruner, savings=savings, **shared)
        except ValueError as error:
            notes.append(f"`{spec}` at K={k}: {error}")
    return notes


def _write(facts: dict[str, Any], text: str, folder: Path) -> list[Path]:
    """Write results.json, report.md and flops.png, each whole or not at all."""
    paths = [folder / "results.json", folder / "report.md"]
    for path, content in zip(paths, (json.dumps(facts, indent=1) + "\n", text), strict=True):
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return [*paths, save_figure(bars(facts), folder / "flops.png", dpi=120)]
