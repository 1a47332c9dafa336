"""Flags that commands share; as `flags`, it imports nothing that takes long."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, get_args

from ocvtp import choices


def of_training(
    command: str, description: str, instead: Mapping[str, str] | None = None
) -> argparse.ArgumentParser:
    """The parser of a command that takes the settings of a training run beside flags of its own.

    Args:
        command: its name. description: of it.
        instead: switches that stand in place of --output, each with its help.
    """
    places = ["--output DIR", *(instead or ())]
    said = places[0] if len(places) == 1 else f"({' | '.join(places)})"
    found = argparse.ArgumentParser(
        prog=f"ocvtp {command}",
        description=description,
        usage=f"%(prog)s --config FILE|NAME {said} [flags] [--SETTING VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    output: dict[str, Any] = {"metavar": "DIR", "help": "folder to write"}
    if instead:
        either = found.add_mutually_exclusive_group(required=True)
        either.add_argument("--output", **output)
        for switch, told in instead.items():
            either.add_argument(switch, action="store_true", help=told)
    else:
        found.add_argument("--output", required=True, **output)
    found.add_argument("--device", help="e.g. cpu, cuda:1 (default: a GPU where there is one)")
    add_json(found)
    return found


def add_json(parser: argparse.ArgumentParser) -> None:
    """The flag --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, where and in which precision."""
    parser.add_argument(
        "--model",
        required=True,
        help="folder or hub id of a VLM; random weights: " + ", ".join(choices.TINY_MODELS),
    )
    add_place(parser)


def add_model_or_tower(parser: argparse.ArgumentParser) -> None:
    """Which model, or which vision tower alone; where, and in which precision."""
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument(
        "--model",
        help="folder or hub id of a VLM; random weights: " + ", ".join(choices.TINY_MODELS),
    )
    judged.add_argument(
        "--tower",
        help="a vision tower without a language model: local-dir:PATH, hf-hub:ID or timm:NAME of"
        " timm; folder or hub id of a CLIP, SigLIP, SigLIP2, DINOv2, DINOv3 or a VLM that has one;"
        " random:tiny, random:tiny-dinov2 and others",
    )
    parser.add_argument(
        "--img-size",
        type=int,
        help="of --tower: pixels along the side of its picture, for towers of timm and DINO towers"
        " (default: the tower's own)",
    )
    parser.add_argument(
        "--feature-layer",
        type=int,
        help="of --tower: the layer of hidden_states that a language model would read (default: the"
        " one that the VLM of that folder reads; of other towers -2, the second to last)",
    )
    add_place(parser)


def tower_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The tower of `add_model_or_tower`, for `TowerSubject`."""
    names = ("img_size", "feature_layer", "dtype", "device")
    return {"name": arguments.tower, **{name: getattr(arguments, name) for name in names}}


def check_tower(arguments: argparse.Namespace) -> None:
    """Refuse flags of a tower without one, and those of a VLM with one.

    Raises:
        ValueError: for the first that does not fit.
    """
    of_model = arguments.tower is None
    if not of_model and getattr(arguments, "positions", None):
        raise ValueError(
            f"--positions {' '.join(arguments.positions)} are those in a language model, and"
            " --tower has none; leave them out, or pass --model."
        )
    for name in ("img_size", "feature_layer") if of_model else ("text_tower", "prompt"):
        if (value := getattr(arguments, name, None)) is None:
            continue
        flag = "--" + name.replace("_", "-")
        if of_model:
            raise ValueError(
                f"{flag} {value} is of a vision tower alone, and --model names a VLM, which says"
                " it itself; leave it out, or pass --tower instead of --model."
            )
        raise ValueError(
            f"{flag} is for pruners that read the prompt, and --tower has none; leave it out, or"
            " pass --model."
        )


def add_place(parser: argparse.ArgumentParser) -> None:
    """Where a model is, and in which precision."""
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="e.g. cpu, cuda (default: %(default)s)")


_PRUNER_SETTINGS = ("num_keep", "keep_ratio", "max_keep", "checkpoint")


def add_pruner(parser: argparse.ArgumentParser, several: bool) -> None:
    """Which pruner(s), the budget, and what those need that read the prompt."""
    _add_pruner(parser, several).add_argument(
        "--max-keep", type=int, help="the most tokens of an image; one that has no more stays whole"
    )
    add_text_tower(parser)


def _add_pruner(parser: argparse.ArgumentParser, several: bool) -> Any:
    """Returns the group of budgets, of which one may be given."""
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
    parser.add_argument("--checkpoint", help="exported network, for pruners that take one")
    return budget


def pruner_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_pruner` asks for besides the pruner, for `build_spec`."""
    return {name: getattr(arguments, name) for name in _PRUNER_SETTINGS}


def add_served(parser: argparse.ArgumentParser) -> None:
    """The pruner of a server: its budget is that of requests that name none."""
    _add_pruner(parser, several=False)
    parser.add_argument(
        "--max-keep", type=int, help="the most tokens of an image that any request keeps"
    )
    add_budget(parser)
    parser.add_argument(
        "--separators",
        choices=("all", "none"),
        default="all",
        help="whether tokens that end rows of tiles stay (default: %(default)s)",
    )


def served_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of a server, of what `add_served` asks for; what is not given is left out."""
    given = {"pruner": arguments.pruner, **pruner_settings(arguments)}
    plain = {"budget": "per_image", "separators": "all"}
    given |= {name: getattr(arguments, name) for name in plain}
    return {k: v for k, v in given.items() if v is not None and plain.get(k) != v}


def add_text_tower(parser: argparse.ArgumentParser) -> None:
    """The CLIP of pruners that read the prompt by it."""
    parser.add_argument(
        "--text-tower",
        help="folder or hub id of the CLIP that the vision tower is from, for pruners that compare"
        " images with the prompt; random:tiny for random:tiny-llava",
    )


_OWN = "; not needed where every pruner says its own budget"


def add_budgets(parser: argparse.ArgumentParser) -> None:
    """The budgets that several pruners are tried at; none where each says its own."""
    budget = parser.add_mutually_exclusive_group()
    told = f"tokens kept per image{_OWN}"
    budget.add_argument("--num-keep", type=int, nargs="+", help=told)
    budget.add_argument("--keep-ratio", type=float, nargs="+", help="shares of tokens kept")


def add_counts(parser: argparse.ArgumentParser) -> None:
    """The same as counts alone; none where each pruner says its own."""
    told = f"visual tokens kept per image{_OWN}"
    parser.add_argument("--num-keep", type=int, nargs="+", default=[], help=told)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """What a budget counts where a model cuts images into tiles."""
    parser.add_argument(
        "--budget",
        choices=get_args(choices.TileBudget),
        default="per_image",
        help="what --num-keep counts for models that cut images into tiles (default: %(default)s)",
    )


def add_skip_unfit(parser: argparse.ArgumentParser) -> None:
    """What to do with pruners that a model cannot run."""
    parser.add_argument(
        "--skip-unfit",
        action="store_true",
        help="leave out what cannot run on this model, with a note, instead of stopping",
    )


def add_optional_model(parser: argparse.ArgumentParser) -> None:
    """A model that need not be; `refuse_without_model` says whose the other flags are."""
    parser.add_argument(
        "--model",
        help="folder or hub id of a VLM: which pruners run on it, and what others would need;"
        " random weights: " + ", ".join(choices.TINY_MODELS),
    )
    add_place(parser)
    add_text_tower(parser)


def refuse_without_model(arguments: argparse.Namespace) -> None:
    """Refuse flags of a model where there is none.

    Raises:
        ValueError: for the first that was given.
    """
    for name, plain in (("dtype", "auto"), ("device", "cpu"), ("text_tower", None)):
        if (value := getattr(arguments, name)) != plain:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value} is of a model; pass --model too, or leave it out.")


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1 of what is counted, a flag or a list of it.

    Raises:
        ValueError: for the first.
    """
    for name in names:
        value = getattr(arguments, name)
        for count in value if isinstance(value, list) else [value]:
            if count is not None and count < 1:
                raise ValueError(f"--{name.replace('_', '-')} {count}; pass at least 1.")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """What `bench` measures: the sizes of a request, and how often."""
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
