"""Commands as a user types them, to be printed: they run as they stand."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_BEFORE: ContextVar[tuple[str, ...]] = ContextVar("before_the_command", default=())


@contextmanager
def typed_before(words: Sequence[str]) -> Iterator[None]:
    """What was typed between `ocvtp` and the command, e.g. `--import FILE`, holds in the block."""
    token = _BEFORE.set(tuple(words))
    try:
        yield
    finally:
        _BEFORE.reset(token)


def command(*words: str) -> str:
    """`ocvtp` with these words, quoted for a shell, and with those of `typed_before`."""
    return shlex.join(["ocvtp", *_BEFORE.get(), *words])
