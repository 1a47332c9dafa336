"""Writing files: all of one or nothing."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name next to `path`, renamed to `path` when the block ends without an error.

    The folder is made where absent.

    Raises:
        OSError: see `named`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with named(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what writers of a file left beside it when they were killed; none may be writing."""
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file that there is no room for; the system does not.

    Raises:
        OSError: that names `path` where the disk is full or a file may not grow so far.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def refuse_cut(path: Path, end: bytes) -> None:
    """Refuse a file that a library wrote and that does not end as its format does.

    Args:
        path: of the file.
        end: its last bytes.

    Raises:
        OSError: if it ends in another way.
    """
    if not path.read_bytes().endswith(end):
        raise OSError(errno.EIO, "not all of it was written", str(path))


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file: all of it, or nothing.

    Libraries that write a file themselves may not notice a full disk: what they make is passed
    here.

    Args:
        path: of the file.
        data: what it holds.

    Raises:
        OSError: if it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)
        if temporary.stat().st_size != len(data):
            raise OSError(errno.EIO, "not all of it was written", str(path))
