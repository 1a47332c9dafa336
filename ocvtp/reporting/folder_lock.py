"""Locks of files: one writer of a folder, of which a second one is told; and turns, one by one.

The operating system holds a lock: it ends with its process, however that ends, and processes that
were started by it do not keep it.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

try:
    import fcntl
except ImportError:  # Windows, where nothing tells two processes apart
    fcntl = None  # type: ignore[assignment]

_LOG = logging.getLogger(__name__)
_UNKNOWN = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems say that know no locks: some of clusters and of object stores."""
_LOOKS_EVERY = 0.1
"""Seconds between two looks at a lock that is waited for."""
_own: dict[Path, int] = {}
"""What this process has locked, and its number: the system tells processes apart, not threads, and
a process that was started by another has its own number."""
_changing = Lock()


class _Taken(Exception):
    """Another one has the lock; the text says who."""


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

    def refuse(who: str) -> None:
        raise ValueError(
            f"{folder} is being written to by {who}; wait until it ends, or pass another --output."
        )

    try:
        with _locked(folder.resolve() / f".ocvtp{part and '-'}{part}.lock", command, refuse):
            yield
    finally:
        for place in made:
            with suppress(OSError):  # something is in it
                place.rmdir()


@contextmanager
def in_turn(path: Path, work: str) -> Iterator[None]:
    """Be the only process and thread in the block for this file; others wait until it ends.

    Args:
        path: of the file that is made; the lock lies beside it meanwhile.
        work: what is done, for a warning to those who wait: `reads FILE`.

    Raises:
        OSError: if there can be no lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told: list[str] = []

    def wait(who: str) -> None:
        if not told:
            told.append(who)
            _LOG.warning("waiting for the process that %s", work)
        time.sleep(_LOOKS_EVERY)

    with _locked(path.with_name(f".{path.name}.lock"), work, wait):
        yield


def _make(folder: Path) -> list[Path]:
    """The folders that were made, the deepest first."""
    absent = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return absent


@contextmanager
def _locked(path: Path, work: str, taken: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock; `taken` is told who has it, and returns where that is to be tried again."""
    while True:
        try:
            lock = _lock(path)
            break
        except _Taken as error:
            taken(str(error))
    try:
        if lock is not None:
            os.write(lock, f"{work} (process {os.getpid()} on {socket.gethostname()})".encode())
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            os.close(lock)
        with _changing:
            _own.pop(path, None)


def _lock(path: Path) -> int | None:
    """An open file that no one else has locked; None where the system locks no files."""
    with _changing:
        if _own.get(path) == os.getpid():
            raise _Taken("this process")
        _own[path] = os.getpid()
    try:
        return None if fcntl is None else _of_the_system(path)
    except BaseException:
        with _changing:
            _own.pop(path, None)
        raise


def _of_the_system(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock_file(file, path.parent)
            if _is_still(path, file):
                os.ftruncate(file, 0)
                return file
            os.close(file)  # the last writer took it away meanwhile
        except (BlockingIOError, PermissionError) as error:  # systems differ
            who = os.read(file, 500).decode(errors="replace") or "another process"
            os.close(file)
            raise _Taken(who) from error


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


def _is_still(path: Path, file: int) -> bool:
    """Whether an open file is the one that lies at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
