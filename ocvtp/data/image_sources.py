"""Images that are no files of a folder: members of tar files, and rows of a table.

H x W are an image's pixels after the transform, h x w before it.
"""

from __future__ import annotations

import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ocvtp.data.coco import IMAGE_SUFFIXES, ImageTransform
from ocvtp.data.image_names import inside
from ocvtp.data.loader import ends
from ocvtp.data.mapped_arrays import MappedArrays, TextArray, kept_arrays
from ocvtp.field_types import shown
from ocvtp.images import IMAGE_ERRORS, decode_image

_EXTRA = "pip install -e '.[datasets]' in a clone"
_SPLIT = "train"
"""Which stands for all files, where no name begins so."""


class SourceImages(Dataset[dict[str, Any]], ABC):
    """Images of a source, in its order.

    An item is one of `ocvtp.data.coco.CocoImages` without instances; images are turned upright.

    Args:
        transform: the host's own image processing.
        on_error: `raise` a ValueError on an unreadable image, or `skip` it and name it.

    Attributes:
        starts: [shards + 1] number of the first image of every file, and of all.
        files: that they are read from.

    Raises:
        ValueError: for another `on_error`.
    """

    starts: NDArray[np.int64]
    files: frozenset[Path] = frozenset()

    def __init__(self, transform: ImageTransform, on_error: Literal["raise", "skip"]) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} is unknown; pass 'raise' or 'skip'.")
        self.transform, self.on_error = transform, on_error

    @abstractmethod
    def name(self, index: int) -> str:
        """Names an image, in every run."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """What its file would hold.

        Raises:
            IMAGE_ERRORS: if it cannot be read.
        """

    @property
    def names(self) -> list[tuple[int, str]]:
        """Number and name of every item."""
        return [(index, self.name(index)) for index in range(len(self))]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        name = self.name(index)
        try:
            image = decode_image(self.read(index))
        except IMAGE_ERRORS as error:
            reason = str(error) or type(error).__name__
            if self.on_error == "skip":
                return {"error": f"{name}: {reason}"}
            raise ValueError(
                f"image {name} cannot be used: {reason}; replace it, or pass on_error='skip' to"
                " continue without it."
            ) from error
        return {
            "pixel_values": self.transform(image),
            "image_size": image.size[::-1],
            "image_id": index,
            "file_name": name,
            "path": name,
        }


class TarImages(SourceImages):
    """Images in tar files, as webdataset has them: each read where it lies.

    Every member of a tar that is called like an image (`IMAGE_SUFFIXES`) is one; all others, e.g.
    labels, are left out. Where they lie is found once and kept beside a tar, see
    `ocvtp.data.mapped_arrays`.

    Args:
        paths: of the tar files, see `tar_files`.
        transform: the host's own image processing.
        on_error: see `SourceImages`.

    Raises:
        ValueError: if one is missing, is no tar or compressed, or if there is no image in any.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        transform: ImageTransform,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__(transform, on_error)
        self.paths = list(paths)
        self.files = frozenset(path.resolve() for path in self.paths)
        self._members = [_members(path) for path in self.paths]
        self._names = [TextArray.named(found, "names") for found in self._members]
        self.starts = ends([len(names) for names in self._names])
        if not len(self):
            raise ValueError(
                f"{self.paths[0]} and the tar files beside it hold no image ("
                f"{', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}); pass others."
            )

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - int(self.starts[number])

    def name(self, index: int) -> str:
        number, place = self._place(index)
        return f"{self.paths[number]}/{self._names[number][place]}"

    def read(self, index: int) -> bytes:
        number, place = self._place(index)
        start, size = self._members[number]["places"][place].tolist()
        with self.paths[number].open("rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise EOFError(f"the tar file ends inside of it, after {len(data)} of {size} bytes")
        return data


def tar_files(pattern: str | Path) -> list[Path]:
    """Those of a folder and below, or those that a pattern names.

    Args:
        pattern: a folder, a file, or a path whose name has ranges, `shard-{000..119}.tar`.

    Returns:
        sorted by path; of ranges, in their order.

    Raises:
        ValueError: if there is none, or one is missing.
    """
    path = Path(pattern)
    if path.is_dir():
        found = sorted(own for own in path.rglob("*.tar") if own.is_file())
        if not found:
            raise ValueError(f"{path} holds no .tar files; pass a folder of them, or a pattern.")
        return found
    found = [Path(name) for name in _ranges(str(pattern))]
    absent = [own for own in found if not own.is_file()]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(found)} tar files do not exist, {absent[0]} first; pass a"
            " folder of .tar files, or a pattern like shard-{000..119}.tar."
        )
    return found


def _ranges(pattern: str) -> list[str]:
    """`a{01..03}` as a01, a02, a03; every range of it."""
    head, brace, rest = pattern.partition("{")
    inner, closing, tail = rest.partition("}")
    first, dots, last = inner.partition("..")
    if not brace:
        return [pattern]
    if not closing or not dots or not (first.isdecimal() and last.isdecimal()):
        raise ValueError(f"{pattern} has no range of numbers in its braces; pass {{000..119}}.")
    width = len(first) if len(first) == len(last) else 0
    numbers = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    if not numbers:
        raise ValueError(f"the range {{{inner}}} of {pattern} is empty; pass the lower one first.")
    return [f"{head}{number}{end}" for number, end in product(numbers, _ranges(tail))]


def _members(path: Path) -> MappedArrays:
    """Names of the images in a tar, and `places` [images, 2]: their first bytes and sizes."""

    def make() -> dict[str, NDArray[Any]]:
        names, places = [], []
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    is_image = Path(member.name).suffix.lower() in IMAGE_SUFFIXES
                    if member.size < 0:
                        raise tarfile.ReadError(f"{shown(member.name)} has {member.size} bytes")
                    if is_image and member.isreg() and not member.issparse():
                        names.append(member.name)
                        places.append((member.offset_data, member.size))
        except (OSError, ValueError, tarfile.TarError) as error:
            raise ValueError(
                f"{path} is no tar file that can be read ({error}); unpack it if it is compressed,"
                " or make it again."
            ) from error
        numbers = np.array(places, np.int64).reshape(-1, 2)
        return {**TextArray.of(names).arrays("names"), "places": numbers}

    return kept_arrays(path, "images", make)


class _Table(Protocol):
    """What is read of a `datasets.Dataset`."""

    column_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class TableImages(SourceImages):
    """The images of a table of Hugging Face's `datasets`: of local files alone.

    Args:
        path: a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, a .parquet file, or
            a folder of these. Tables are mapped, not read into memory.
        transform: the host's own image processing.
        split: of a folder of several, or the beginning of the names of parquet files; `train`, the
            default, is all of these where no name begins so.
        column: with the images.
        on_error: see `SourceImages`.
        outside: whether rows that name a file in place of its bytes may name one outside of the
            table's folder.

    Raises:
        ValueError: if `datasets` is not installed, or there is no such table, split or column.
    """

    def __init__(
        self,
        path: str | Path,
        transform: ImageTransform,
        split: str = _SPLIT,
        column: str = "image",
        on_error: Literal["raise", "skip"] = "raise",
        outside: bool = False,
    ) -> None:
        super().__init__(transform, on_error)
        self.path, self.column, self.outside = Path(path), column, outside
        table, files = _table(self.path, split)
        self.files = frozenset(Path(file).resolve() for file in files)
        if column not in table.column_names:
            raise ValueError(
                f"{path} has no column {column!r}, but {', '.join(table.column_names)}; pass column"
                " with the name of the one that has the images."
            )
        self._table = _undecoded(table, column)
        self._split = split
        if not len(table):
            raise ValueError(f"{path} has no rows in {split!r}; pass a table that has.")
        self.starts = ends([len(table)])

    def name(self, index: int) -> str:
        return f"{self.path}/{self._split}/{index}"

    def read(self, index: int) -> bytes:
        found = self._table[index][self.column]
        data, path = (found.get("bytes"), found.get("path")) if found else (None, None)
        if data is None and path is not None:
            return self._file(path).read_bytes()
        if data is None:
            raise ValueError("the row has no image")
        return cast(bytes, data)

    def _file(self, name: str) -> Path:
        """The file that a row names, from the table's folder or by its whole path."""
        folder = self.path if self.path.is_dir() else self.path.parent
        whole = folder.absolute()
        if Path(name).is_relative_to(whole):
            name = str(Path(name).relative_to(whole))
        return inside(folder, name, self.outside)


def _table(path: Path, split: str) -> tuple[_Table, list[str]]:
    """The rows of a split, and the files that they are in."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"tables of images are read with the library datasets, which is not here ({error});"
            f" run {_EXTRA}."
        ) from error
    names = [str(own) for own in (_parquet(path, split) if path.is_dir() else [path])]
    try:
        if names:
            loaded = datasets.Dataset.from_parquet(names)
        else:
            loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises anything on files that are none of its own
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(
            f"{path} is no table of images that can be read ({reason}); pass"
            " a .parquet file, a folder of these, or what save_to_disk wrote."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{path} has no split {split!r}, but {', '.join(loaded)}; pass one.")
        loaded = loaded[split]
    files = names or [file["filename"] for file in loaded.cache_files]
    return cast(_Table, loaded), files


def _parquet(folder: Path, split: str) -> list[Path]:
    """Parquet files of a folder and below, sorted: those of the split where names tell splits.

    Raises:
        ValueError: where they tell others than one that was named.
    """
    found = sorted(folder.rglob("*.parquet"))
    own = [path for path in found if path.name.startswith(split)]
    if found and not own and split != _SPLIT:
        begin = (re.match(r"[^-_.\d]*", path.name) for path in found)
        known = ", ".join(dict.fromkeys(head[0] for head in begin if head and head[0]))
        which = f"but {known}; pass one" if known else "as names of its files begin with none"
        raise ValueError(f"{folder} has no split {split!r}, {which}, or leave it out for all.")
    return own or found


def _undecoded(table: Any, column: str) -> _Table:
    """The same with the images as they are stored, for the one place that opens images."""
    import datasets

    feature = table.features[column]
    if not isinstance(feature, datasets.Image):
        stored = feature if isinstance(feature, dict) else {}
        if set(stored) != {"bytes", "path"}:
            raise ValueError(
                f"the column {column!r} holds {feature!r}, not images; pass column with the name of"
                " the one that has them."
            )
        return cast(_Table, table.select_columns([column]))
    alone = table.select_columns([column])
    return cast(_Table, alone.cast_column(column, datasets.Image(decode=False)))
