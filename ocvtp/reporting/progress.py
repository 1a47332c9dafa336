"""Progress of long work, on stderr: stdout is for results. All commands show it by this."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)

_SECONDS = 30.0
"""Between two lines in a file."""
_WINDOW = 600.0
"""The last seconds that the time left is told from: steps may take minutes."""
_FEW = 200
"""Items that are done at once."""

_T = TypeVar("_T")


def progress_bar(*extra: str) -> Progress:
    """A bar of steps done, the time that is left, and what is being done.

    Where stderr is no terminal, say a file of a batch system, a line every half minute.

    Args:
        extra: further columns, e.g. `{task.fields[loss]}`.
    """
    console = Console(stderr=True, force_jupyter=False)
    texts = ("{task.description}", *extra)
    if not console.is_terminal:
        return _Lines(console, texts)
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *(TextColumn(column) for column in texts),
        console=console,
        speed_estimate_period=_WINDOW,
    )


def tracked(items: Iterable[_T], description: str, total: int) -> Iterator[_T]:
    """The items; with a `progress_bar` where they are more than a few."""
    if total <= _FEW:
        yield from items
        return
    with progress_bar() as progress:
        yield from progress.track(items, total, description=description)


class _Lines(Progress):
    """A line now and then, and one at the end.

    Args:
        console: that it is written to. texts: formats of a `task`.
    """

    def __init__(self, console: Console, texts: tuple[str, ...]) -> None:
        super().__init__(
            console=console, auto_refresh=False, disable=True, speed_estimate_period=_WINDOW
        )
        self._texts = texts
        self._said = time.monotonic()

    def advance(self, *args: Any, **options: Any) -> None:
        super().advance(*args, **options)
        self._now_and_then()

    def update(self, *args: Any, **options: Any) -> None:
        super().update(*args, **options)
        self._now_and_then()

    def stop(self) -> None:
        super().stop()
        self._say()

    def _now_and_then(self) -> None:
        if time.monotonic() - self._said >= _SECONDS:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        for task in self.tasks:
            words = (text.format(task=task) for text in self._texts)
            parts = [_done(task), *filter(None, words)]
            self.console.print("  ".join(parts), markup=False, highlight=False, soft_wrap=True)


def _done(task: Task) -> str:
    """`120/400, 0:02:10 left`."""
    if task.total is None:
        return f"{task.completed:.0f}"
    left = f", {_clock(task.time_remaining)} left" if task.time_remaining else ""
    return f"{task.completed:.0f}/{task.total:.0f}{left}"


def _clock(seconds: float) -> str:
    """`0:02:10`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
