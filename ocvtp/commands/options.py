"""Flags that commands share."""

from __future__ import annotations

import argparse
from typing import get_args

from ocvtp.hosts.base import TileBudget
from ocvtp.hosts.loading import RANDOM_MODELS
from ocvtp.pruners import Pruner
from ocvtp.pruners.specs import build_spec


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, where and in which precision."""
    parser.add_argument(
        "--model",
        required=True,
        help="folder or hub id of a VLM; random weights: " + ", ".join(RANDOM_MODELS),
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="e.g. cpu, cuda (default: %(default)s)")


def add_pruner(parser: argparse.ArgumentParser, several: bool) -> None:
    """Which pruner(s), and the budget."""
    parser.add_argument(
        "--pruner",
        required=True,
        nargs="+" if several else None,
        metavar="NAME[:KEY=VALUE,...]",
        help="see `ocvtp list`; e.g. fastervlm, or fastervlm:block=-3",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--num-keep", type=int, help="tokens kept per image")
    budget.add_argument("--keep-ratio", type=float, help="share of tokens kept")
    parser.add_argument("--checkpoint", help="exported OC-pruner, for pruners that take one")
    add_text_tower(parser)


def add_text_tower(parser: argparse.ArgumentParser) -> None:
    """The CLIP of pruners that read the prompt by it."""
    parser.add_argument(
        "--text-tower",
        help="folder or hub id of the CLIP that the vision tower is from, for pruners that compare"
        " images with the prompt; random:tiny for random:tiny-llava",
    )


def add_budget(parser: argparse.ArgumentParser) -> None:
    """What a budget counts where a model cuts images into tiles."""
    parser.add_argument(
        "--budget",
        choices=get_args(TileBudget),
        default="per_image",
        help="what --num-keep counts for models that cut images into tiles (default: %(default)s)",
    )


def build(spec: str, arguments: argparse.Namespace) -> Pruner:
    """The pruner of `NAME:KEY=VALUE,...`, with the shared flags where it knows them.

    Raises:
        ValueError: for a spec that does not parse, and what `build_pruner` refuses.
    """
    shared = {k: getattr(arguments, k) for k in ("num_keep", "keep_ratio", "checkpoint")}
    return build_spec(spec, **shared)
