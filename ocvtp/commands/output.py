"""Printing results: text for people, or one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ocvtp.reporting import command_line
from ocvtp.reporting.files import replacing
from ocvtp.reporting.plain_text import terminal


def folder(path: str) -> Path:
    """A folder that results can be written to; nothing is made yet.

    Raises:
        ValueError: if it is a file, lies in one, or may not be written to.
    """
    found = Path(path)
    _check(found, path)
    return found


def file(path: str) -> Path:
    """A file that can be written, as `folder`."""
    found = Path(path)
    if found.is_dir():
        raise ValueError(f"--output {path} is a folder; pass the name of a file.")
    _check(found.parent, path)
    return found


def _check(place: Path, given: str) -> None:
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"--output {given}: {there} is a file; pass a folder, or a new name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--output {given}: {there} may not be written to; pass another place.")


def command(arguments: argparse.Namespace) -> str:
    """The command that these arguments are of."""
    return command_line.command(*arguments.words)


def emit(facts: dict[str, Any], text: str, as_json: bool) -> None:
    """Print `facts` as one JSON object, or `text`, on stdout."""
    sys.stdout.write((json.dumps(facts, default=str) if as_json else terminal(text)) + "\n")
    sys.stdout.flush()  # here, where somebody learns that nobody reads it


def print_or_write(text: str, path: Path | None, facts: dict[str, Any], as_json: bool) -> None:
    """Print a text, or write it to a file, whole or not at all, and say so.

    Args:
        text: ends its last line.
        path: see `file`; None to print it.
        facts: in place of both on stdout, `as_json`.
    """
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    emit(facts, text.rstrip("\n") if path is None else f"wrote {path}", as_json)


@contextmanager
def kept_for_results() -> Iterator[None]:
    """What is written to stdout inside the block, by processes begun there too, goes to stderr."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(own, 1)
        os.close(own)
