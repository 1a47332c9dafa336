"""`python -m tools.photo_vlm train` and `python -m tools.photo_vlm assemble`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ocvtp.evaluation.tables import short
from tools.photo_vlm.folders import assemble
from tools.photo_vlm.recipe import make_model, measure
from tools.photo_vlm.settings import PhotoSettings, default_stages


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; what is wrong is said in one line."""
    arguments = _parser().parse_args(words)
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        print(f"photo_vlm: error: {error}", file=sys.stderr)
        return 2


def _train(arguments: argparse.Namespace) -> int:
    known = ("run", "no_figures", "scale")
    given = {k: v for k, v in vars(arguments).items() if k not in known}
    settings = PhotoSettings(**given, stages=default_stages(arguments.scale))
    root = make_model(settings)
    if not arguments.no_figures:
        print(short(measure(settings)))
    print(f"wrote {root}")
    return 0


def _assemble(arguments: argparse.Namespace) -> int:
    assemble(arguments.reader, arguments.tower, arguments.output)
    print(f"wrote {arguments.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.photo_vlm", description=__doc__)
    commands = parser.add_subparsers(required=True)
    tower = {"required": True, "metavar": "DIR", "help": "a DINOv2 that timm wrote"}
    trained = commands.add_parser("train", help="draw, encode, train, assemble and measure")
    trained.set_defaults(run=_train)
    trained.add_argument("--coco", required=True, metavar="DIR", help="in COCO's layout of 2017")
    trained.add_argument("--photos", required=True, metavar="DIR", help="backgrounds")
    trained.add_argument("--tower", **tower)  # type: ignore[arg-type]
    trained.add_argument("--output", default="outputs/photo-vlm", metavar="DIR")
    numbers = {
        "num_train": "composites to learn from",
        "num_test": "composites to be measured on",
        "questions": "on each of these, at most",
        "seed": "of composites, questions and weights",
    }
    for name, text in numbers.items():
        default = getattr(PhotoSettings, name)
        text = f"{text} (default: {default})"
        trained.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=text)
    trained.add_argument(
        "--scale", type=float, default=1.0, help="of the numbers of steps (default: 1)"
    )
    trained.add_argument("--no-figures", action="store_true", help="leave the measuring out")
    whole = commands.add_parser("assemble", help="put the tower into a trained reader")
    whole.set_defaults(run=_assemble)
    whole.add_argument("--reader", required=True, metavar="DIR", help="e.g. OUTPUT/reader")
    whole.add_argument("--tower", **tower)  # type: ignore[arg-type]
    whole.add_argument("--output", required=True, metavar="DIR", help="of the whole model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
