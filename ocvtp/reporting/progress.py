"""Progress of long work, on stderr: stdout is for results."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


def progress_bar(*extra: str) -> Progress:
    """A bar of steps done, the time that is left, and what is being done.

    Args:
        extra: further columns, e.g. `{task.fields[loss]}`.
    """
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *(TextColumn(column) for column in ("{task.description}", *extra)),
        console=Console(stderr=True, force_jupyter=False),
    )
