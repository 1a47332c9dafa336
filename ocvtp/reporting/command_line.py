"""Commands as a user types them, to be printed: they run as they stand."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_before: list[str] = []
"""Of the command that this process is."""


@contextmanager
def typed_before(words: Sequence[str]) -> Iterator[None]:
    """What was typed between `ocvtp` and the command, e.g. `--import FILE`, holds in the block."""
    outside = list(_before)
    _before[:] = words
    try:
        yield
    finally:
        _before[:] = outside


def command(*words: str) -> str:
    """`ocvtp` with these words, quoted for a shell, and with those of `typed_before`."""
    return shlex.join(["ocvtp", *_before, *words])
