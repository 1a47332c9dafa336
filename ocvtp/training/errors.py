"""What goes wrong in other libraries, as a ValueError of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_fabric.utilities.exceptions import MisconfigurationException

from ocvtp.training.lifecycle import LateStart

_NO_KIND = "Does not validate against any of the Union"
"""How the parser's message begins; it stands in itself where a class is a setting of a class."""


@contextmanager
def clear_errors(building: bool = False) -> Iterator[None]:
    """Turn errors of wrong settings that are found late into one line.

    Args:
        building: whether the block only builds what settings describe, so that all errors are
            theirs.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(_line(error)) from error
    except ValueError as error:
        lines = str(error).splitlines()
        if len(lines) > 1 and "worker process" in lines[0]:  # with the traceback of that process
            raise ValueError(lines[-1].removeprefix("ValueError: ")) from error
        if building and isinstance(error, UnicodeDecodeError):
            raise ValueError(f"a file of settings is no text: {error}") from error
        if building and (said := _of_a_class(lines)):
            raise ValueError(said) from error
        raise
    except Exception as error:
        if not building:
            raise
        raise ValueError(f"what the settings ask for cannot be built: {_line(error)}") from error


@contextmanager
def restoring(resume: str | None, start: LateStart) -> Iterator[None]:
    """Errors after the data opened and before training are the checkpoint's, if there is one."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        if resume is None or start.started or not start.opened:
            raise
        raise ValueError(f"--resume {resume} cannot be continued: {_line(error)}") from error


def _of_a_class(lines: list[str]) -> str:
    """What a class said of its arguments, where the parser says that no kind of value fits."""
    if not lines or not lines[0].startswith(_NO_KIND):
        return ""
    told = (line.strip().removeprefix("- ") for line in lines if line.lstrip().startswith("- "))
    return next((line for line in told if not line.startswith(("Expected a ", _NO_KIND))), "")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
