"""Arrays that are made of a file once, kept beside it, and mapped into memory by every process.

They lie in one file of safetensors, `NAME.KIND.index` beside the file NAME, or below the user's
cache folder where that cannot be written. It is there whole or not at all, and counts while NAME
has the size and the times of change that it was made of. One process makes it; others wait.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ocvtp.reporting.files import replacing
from ocvtp.reporting.folder_lock import in_turn

logger = logging.getLogger(__name__)

FORMAT = 1
_STAMP = "made_of"
KEPT_FROM = 2**20
"""Bytes of the file: smaller ones are read again faster than looked for."""


class MappedArrays(Mapping[str, NDArray[Any]]):
    """Arrays by name, in a file or made just now.

    A process that gets those of a file maps the file itself: they are neither copied nor sent.

    Args:
        arrays: by name. path: of the file that they are mapped from; None where there is none.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], path: Path | None = None) -> None:
        self._arrays, self.path = dict(arrays), path

    @classmethod
    def open(cls, path: Path) -> tuple[Self, str]:
        """Those of a file, and the state of the source that they were made of.

        Raises:
            ValueError: if it is not there, or damaged.
        """
        try:
            file: Any = safe_open(path, "pt")  # unlike "np", it maps
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}
            return cls(arrays, path), (file.metadata() or {}).get(_STAMP, "")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is gone or damaged ({error}); start again.") from error

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """Those that another process has open; see `open`."""
        return cls.open(path)[0]

    def __reduce__(self) -> tuple[Any, ...]:
        kind = type(self)
        return (kind, (self._arrays,)) if self.path is None else (kind.reopen, (self.path,))

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class TextArray:
    """Texts, one after the other in one array: no process writes to it by counting references.

    Args:
        codes: [bytes of all] uint8.
        ends: [texts + 1] where each starts and the last ends.
    """

    def __init__(self, codes: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.codes, self.ends = codes, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        """These texts."""
        codes, ends = bytearray(), [0]
        for text in texts:
            codes += text.encode("utf-8", "surrogatepass")
            ends.append(len(codes))
        return cls(np.frombuffer(bytes(codes), np.uint8), np.array(ends, np.int64))

    @classmethod
    def named(cls, arrays: Mapping[str, NDArray[Any]], name: str) -> Self:
        """Those that `arrays` gave."""
        return cls(arrays[f"{name}.codes"], arrays[f"{name}.ends"])

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """Both under a name."""
        return {f"{name}.codes": self.codes, f"{name}.ends": self.ends}

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, place: int) -> str:
        part = self.codes[self.ends[place] : self.ends[place + 1]]
        return part.tobytes().decode("utf-8", "surrogatepass")


def kept_arrays(
    source: Path, kind: str, make: Callable[[], Mapping[str, NDArray[Any]]]
) -> MappedArrays:
    """The arrays of a file: those that were kept, if it is as it was; else made now.

    Args:
        source: the file, which is there.
        kind: what is made of it; part of the name that they are kept under.
        make: makes them.

    Raises:
        ValueError: what `make` raises.
    """
    status = source.stat()
    if status.st_size < KEPT_FROM:
        return MappedArrays(make())
    stamp = f"{FORMAT} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    places = _places(source, kind)
    for path in places:
        if (found := _current(path, stamp)) is not None:
            return found
    made: Mapping[str, NDArray[Any]] | None = None
    reasons = []
    for path in places:
        try:
            with in_turn(path, f"reads {source}"):
                found = _current(path, stamp)  # another process may have made it
                if found is None:
                    made = make() if made is None else made
                    with replacing(path) as temporary:
                        save_file(dict(made), temporary, metadata={_STAMP: stamp})
                        temporary.chmod(status.st_mode & 0o666)  # for all who read the source
                    found = _current(path, stamp)
                if found is not None:
                    return found
        except (OSError, SafetensorError) as error:
            reasons.append(f"{path}: {error}")
    logger.warning(
        "what %s holds cannot be kept, so that every process and every start reads it again (%s);"
        " make one of the folders writable",
        source,
        "; ".join(reasons),
    )
    return MappedArrays(make() if made is None else made)


def _current(path: Path, stamp: str) -> MappedArrays | None:
    """Those of a file that was made of this state of the source."""
    try:
        found, made_of = MappedArrays.open(path)
    except ValueError:
        return None
    return found if made_of == stamp else None


def _places(source: Path, kind: str) -> list[Path]:
    """Beside the file, and in the cache of a user who has a home."""
    whole = source.resolve()
    name = f"{whole.name}.{kind}.index"
    folder = hashlib.sha256(str(whole.parent).encode()).hexdigest()[:16]
    beside = whole.with_name(name)
    try:
        return [beside, Path.home() / ".cache" / "ocvtp" / folder / name]
    except RuntimeError:  # a number without a name, as containers run programs
        return [beside]
