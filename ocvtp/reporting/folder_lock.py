"""One writer at a time in a folder: a second one is told whose it is.

The operating system holds the lock: it ends with its process, however that ends, and processes that
were started by it do not keep it.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

try:
    import fcntl
except ImportError:  # Windows, where nothing tells two writers apart
    fcntl = None  # type: ignore[assignment]

_LOG = logging.getLogger(__name__)
_UNKNOWN = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems say that know no locks: some of clusters and of object stores."""
_own: set[Path] = set()
"""What this process has claimed: the system tells processes apart, not threads."""
_changing = Lock()


@contextmanager
def claimed(folder: str | Path, command: str, part: str = "") -> Iterator[None]:
    """Be the one that writes to a folder while the block runs.

    The folder is made where absent, and taken away again if the block leaves it empty.

    Args:
        folder: that is written to.
        command: what writes, for the message to the next.
        part: of the work, where several processes share a folder and each has a part of its own.

    Raises:
        ValueError: if another process has claimed it, or this one has elsewhere.
    """
    folder = Path(folder)
    made = _make(folder)
    path = folder.resolve() / f".ocvtp{part and '-'}{part}.lock"
    try:
        lock = _lock(path, folder)
        try:
            os.write(lock, f"{command} (process {os.getpid()} on {socket.gethostname()})".encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(lock)
            with _changing:
                _own.discard(path)
    finally:
        for place in made:
            with suppress(OSError):  # something is in it
                place.rmdir()


def _make(folder: Path) -> list[Path]:
    """The folders that were made, the deepest first."""
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return absent


def _lock(path: Path, folder: Path) -> int:
    """An open file that no one else has locked."""
    with _changing:
        if path in _own:
            raise ValueError(_told(folder, "this process"))
        _own.add(path)
    try:
        return _of_the_system(path, folder)
    except BaseException:
        with _changing:
            _own.discard(path)
        raise


def _of_the_system(path: Path, folder: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                _lock_file(file, folder)
            if _is_still(path, file):
                os.ftruncate(file, 0)
                return file
            os.close(file)  # the last writer took it away meanwhile
        except (BlockingIOError, PermissionError) as error:  # systems differ
            who = os.read(file, 500).decode(errors="replace") or "another process"
            os.close(file)
            raise ValueError(_told(folder, who)) from error


def _lock_file(file: int, folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        _LOG.warning(
            "the file system of %s knows no locks (%s), so nothing tells a second writer apart:"
            " start no other command that writes to it",
            folder,
            error.strerror,
        )


def _told(folder: Path, who: str) -> str:
    return f"{folder} is being written to by {who}; wait until it ends, or pass another --output."


def _is_still(path: Path, file: int) -> bool:
    """Whether an open file is the one that lies at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
