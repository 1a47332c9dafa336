"""Lists in a JSON object, one entry at a time: a large file never becomes objects as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")


def json_parts(text: str, names: Container[str]) -> Iterator[tuple[str, int, Any]]:
    """The entries of lists of an object.

    Args:
        text: JSON.
        names: of the lists.

    Yields:
        name of a list, 0 and None where it begins, then its name, the place from 1 on and the value
        of every entry.

    Raises:
        ValueError: if it is no JSON.
        TypeError: if it is no object.
    """
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, 0)
    if not text.startswith("{", at):
        raise TypeError(f"{type(json.loads(text)).__name__} in the place of an object")
    at = _skip(text, at + 1)
    mark = "}" if text.startswith("}", at) else ","
    if mark == "}":
        at += 1
    while mark == ",":
        name, at = decode(text, at)
        if not isinstance(name, str):
            raise json.JSONDecodeError("Expecting property name", text, at)
        _, at = _mark(text, at, ":")
        if name in names and text.startswith("[", at):
            yield name, 0, None
            place, at = 0, _skip(text, at + 1)
            inner = "]" if text.startswith("]", at) else ","
            if inner == "]":
                at += 1
            while inner == ",":
                value, at = decode(text, at)
                place += 1
                yield name, place, value
                inner, at = _mark(text, at, ",]")
        else:
            _, at = decode(text, at)
        mark, at = _mark(text, at, ",}")
    if _skip(text, at) != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _skip(text: str, at: int) -> int:
    """Where the next thing is."""
    found = _SPACE.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()


def _mark(text: str, at: int, allowed: str) -> tuple[str, int]:
    """The mark that comes next, and where what follows it is."""
    at = _skip(text, at)
    mark = text[at : at + 1]
    if not mark or mark not in allowed:
        raise json.JSONDecodeError(f"Expecting one of {' '.join(allowed)}", text, at)
    return mark, _skip(text, at + 1)
