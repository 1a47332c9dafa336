"""Printing results: text for people, or one JSON object."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from typing import Any


def command(arguments: argparse.Namespace) -> str:
    """The command that these arguments are of."""
    return shlex.join(["ocvtp", *arguments.words])


def emit(facts: dict[str, Any], text: str, as_json: bool) -> None:
    """Print `facts` as one JSON object, or `text`, on stdout."""
    sys.stdout.write((json.dumps(facts, default=str) if as_json else text) + "\n")
