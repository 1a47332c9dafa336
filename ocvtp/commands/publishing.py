"""The flags of commands that make results and networks ready for others; as `flags`, light."""

from __future__ import annotations

import argparse
from typing import get_args

from ocvtp import choices
from ocvtp.commands import options


def table(parser: argparse.ArgumentParser) -> None:
    """Files, and what of them is shown."""
    _add_files(parser)
    parser.add_argument(
        "--format",
        choices=get_args(choices.TableFormat),
        default="markdown",
        help="(default: %(default)s); LaTeX needs booktabs; CSV has all digits",
    )
    parser.add_argument(
        "--bold",
        choices=get_args(choices.Bold),
        default="best",
        help="the best of a column, with `ci` all that cannot be told from it too (default:"
        " %(default)s)",
    )
    parser.add_argument("--with-interval", action="store_true", help="show 95%% intervals")
    parser.add_argument("--digits", type=int, help="after the decimal point")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--num-keep", type=int, nargs="+", default=[], help="budgets to show")
    budget.add_argument("--keep-ratio", type=float, nargs="+", default=[], help="the same, shares")
    parser.add_argument("--output", help="file to write instead of printing the table")
    options.add_json(parser)


def plot(parser: argparse.ArgumentParser) -> None:
    """Files, what of them is shown, and how wide."""
    _add_files(parser)
    parser.add_argument(
        "--plots",
        nargs="+",
        choices=get_args(choices.PlotKind),
        help="what is drawn (default: all that the files have)",
    )
    parser.add_argument(
        "--width",
        type=float,
        default=3.3,
        help="inches (default: %(default)s, a column of a paper; 7.2 is what evaluate draws)",
    )
    parser.add_argument("--pdf", action="store_true", help="PDF instead of PNG")
    parser.add_argument("--dpi", type=int, default=200, help="of a PNG (default: %(default)s)")
    parser.add_argument(
        "--output", default="outputs/plot", help="folder to write (default: %(default)s)"
    )
    options.add_json(parser)


def merge(parser: argparse.ArgumentParser) -> None:
    """Two evaluations, and where both go."""
    for name in ("a", "b"):
        parser.add_argument(
            name, help="folder or results.json of `ocvtp evaluate`, of one task and model"
        )
    parser.add_argument(
        "--prefer",
        choices=get_args(choices.Preferred),
        help="whose rows to take where the two differ (default: they are refused)",
    )
    parser.add_argument(
        "--output", required=True, help="folder of results.json, report.md and plots"
    )
    options.add_json(parser)


def card(parser: argparse.ArgumentParser) -> None:
    """An artifact, and what it does not say itself."""
    parser.add_argument("artifact", help="folder of an exported network")
    _add_card(parser)
    parser.add_argument(
        "--output", help="file to write, e.g. ARTIFACT/README.md, instead of printing"
    )
    options.add_json(parser)


def push(parser: argparse.ArgumentParser) -> None:
    """An artifact, and where it goes."""
    parser.add_argument("--artifact", required=True, help="folder of an exported network")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="of the hub")
    _add_card(parser)
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the files and the card, and send nothing"
    )
    options.add_json(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="+", help="results.json of `ocvtp evaluate` or `ocvtp bench`"
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        default=[],
        help="e.g. hard/all; of bench ttft, tpot, request, prefill, tower, or one of these with"
        " /unpruned after it (default: the first)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="LABEL",
        help="pruners to show, with spaces or commas between them; the unpruned model always is",
    )


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="what it was trained on, where its config.json does not say")
    parser.add_argument("--license", help="of the weights, as the hub names it, e.g. apache-2.0")
    parser.add_argument(
        "--results",
        help="results.json of `ocvtp evaluate` of this network, for its figures beside untrained"
        " and random ones",
    )
