"""Progress of long work, on stderr: stdout is for results. All commands show it by this."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from ocvtp.reporting.plain_text import duration

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
        extra: further texts, e.g. `{task.fields[loss]}`; on a terminal below the bar.
    """
    console = Console(stderr=True, force_jupyter=False)
    if not console.is_terminal:
        return _Lines(console, ("{task.description}", *extra))
    return _Bar(console, extra)


def tracked(items: Iterable[_T], description: str, total: int) -> Iterator[_T]:
    """The items; with a `progress_bar` where they are more than a few."""
    if total <= _FEW:
        yield from items
        return
    with progress_bar() as progress:
        yield from progress.track(items, total, description=description)


class _Bar(Progress):
    """A bar; on a narrow terminal it and what is being done give way, and the figures stay whole.

    Args:
        console: that it is drawn on. below: formats of a `task`, for a line below its bar.
    """

    def __init__(self, console: Console, below: tuple[str, ...]) -> None:
        whole = Column(no_wrap=True)
        super().__init__(
            BarColumn(),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            TextColumn("{task.description}", table_column=Column()),
            console=console,
            speed_estimate_period=_WINDOW,
        )
        self._below = below

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield from (Text(text) for text in _texts(self._below, task))


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
            line = "  ".join([_done(task), *_texts(self._texts, task)])
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _texts(formats: tuple[str, ...], task: Task) -> Iterator[str]:
    """Of a task; none that is empty."""
    return filter(None, (text.format(task=task) for text in formats))


def _done(task: Task) -> str:
    """`120/400, 2 min 10 s left`."""
    if task.total is None:
        return f"{task.completed:.0f}"
    left = f", {duration(task.time_remaining)} left" if task.time_remaining else ""
    return f"{task.completed:.0f}/{task.total:.0f}{left}"
