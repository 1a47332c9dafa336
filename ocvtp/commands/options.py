"""Flags that commands share."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any, get_args

import yaml

from ocvtp.hosts.base import TileBudget
from ocvtp.hosts.loading import RANDOM_MODELS
from ocvtp.pruners import Pruner, build_pruner, pruner_class


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
    name, _, text = spec.partition(":")
    known = {f.name for f in dataclasses.fields(pruner_class(name))}
    shared = {k: getattr(arguments, k) for k in ("num_keep", "keep_ratio", "checkpoint")}
    settings: dict[str, Any] = {}
    for pair in filter(None, re.split(r",(?=\s*\w+=)", text)):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--pruner {spec!r}: {pair!r} is no KEY=VALUE; write NAME:KEY=VALUE.")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"--pruner {spec!r}: {value!r} is no value; write numbers, words or lists, e.g."
                " stages=[[2,64]]."
            ) from error
    if "stages" in settings:  # these are its budget
        shared |= {"num_keep": None, "keep_ratio": None}
    shared = {k: v for k, v in shared.items() if v is not None and k in known}
    return build_pruner(name, **shared | settings)


def with_template(processor: Any, prompt: str, num_images: int) -> str:
    """A prompt about images in the model's chat template; with their placeholder, as it stands."""
    placeholder = getattr(processor, "image_token", "<image>")
    if placeholder in prompt:
        return prompt
    if getattr(processor, "chat_template", None) is None:
        return "USER: " + f"{placeholder}\n" * num_images + f"{prompt} ASSISTANT:"
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))
