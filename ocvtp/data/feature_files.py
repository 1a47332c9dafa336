"""Features of images in files: shards of safetensors, and a manifest that says what they hold.

    DIR/extraction.json             what they are made with; written first
    DIR/train-00000.safetensors     whole shards, each written at once under its name
    DIR/validation-00000.safetensors
    DIR/manifest.json               written when all shards are there

R rows of a shard: its images in order, every view of an image after the other. A row has n tokens,
those of its `grids`; the tokens of all rows follow each other, T of them, so that images may differ
in their number. A shard's tensors are

    hidden.LAYER, keys.BLOCK            [T, D]
    attention.BLOCK.KIND                [T] fp32
    cls_keys.BLOCK, cls_queries.BLOCK   [R, D]
    cls.LAYER                           [R, D], of the first layer of `needs.hidden`
    grids                               [R, V, 2] int32, see `ocvtp.structures.VisualTokens`
    image_sizes                         [R, 2] int32, height and width before the transform
    instances                           [pixels of all rows] uint8, where the images have masks
    instance_sizes                      [R, 2] int32

and its metadata `images`, a JSON list of `[image id, path]`, `skipped`, what could not be read, and
`sha256` of the bytes of every tensor.
Nothing is pickled; tensors are read as memory-mapped slices.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from ocvtp.data.image_names import check_inside
from ocvtp.field_types import checked, of_fields
from ocvtp.reporting.files import remove_unfinished, replacing
from ocvtp.structures import Layout, Needs

FORMAT = 1
MANIFEST, SETTINGS = "manifest.json", "extraction.json"
SPLITS = ("train", "validation")
OF_TOKENS = ("hidden", "attention", "keys")
"""What has a row for every token."""
OF_IMAGES = ("cls_keys", "cls_queries", "cls")
"""What has one for every image."""

_CODES = {
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
"""The format's own names, the widest first: in this order every tensor lies aligned."""


class ShardWriter:
    """Writes one shard, of any size, in bounded memory.

    Tensors grow in files without a name, which the system removes whatever happens, and are put
    together at the end. Used as a context manager.

    Args:
        path: of the shard. It is there when the block has ended without an error, and not before.
        metadata: written with the tensors; may be filled inside of the block.

    Raises:
        ValueError: if the disk is full.
    """

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self.path, self.metadata = path, metadata
        self._open = ExitStack()
        self._grown: dict[str, tuple[IO[bytes], torch.dtype, list[int]]] = {}
        self._hashes: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._open:
            if kind is None:
                with self._told():
                    self._put_together()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk, as an error that names the file."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be written ({error.strerror or error}), and nothing of it is"
                " left; make room, and run the same command again: it continues."
            ) from error

    def add(self, name: str, values: Tensor) -> None:
        """Put values [k, ...] after those that the tensor of this name has."""
        values = values.detach().cpu().contiguous()
        if name not in self._grown:
            new = self._open.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
            self._grown[name] = (new, values.dtype, [0, *values.shape[1:]])
            self._hashes[name] = hashlib.sha256()
        file, dtype, shape = self._grown[name]
        assert (values.dtype, list(values.shape[1:])) == (dtype, shape[1:]), name
        with self._told():
            data = _bytes(values)
            file.write(data)
            self._hashes[name].update(data)
        shape[0] += len(values)

    def _put_together(self) -> None:
        kinds = list(_CODES)
        names = sorted(self._grown, key=lambda name: (kinds.index(self._grown[name][1]), name))
        hashes = json.dumps({name: self._hashes[name].hexdigest() for name in names})
        metadata = {**self.metadata, "format": str(FORMAT), "sha256": hashes}
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name in names:
            file, dtype, shape = self._grown[name]
            start, end = end, end + file.tell()
            header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with replacing(self.path) as temporary:
            with temporary.open("wb") as whole:
                whole.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    file = self._grown[name][0]
                    file.seek(0)
                    copyfileobj(file, whole, 2**20)
            describe_shard(temporary)  # as a reader will


def describe_shard(path: Path) -> dict[str, Any]:
    """What the manifest says of a shard: its file, bytes, images, what was skipped, and its hash.

    The hash is the sha256 of those of its tensors; shards of earlier versions have none.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            images, skipped = (json.loads(metadata[name]) for name in ("images", "skipped"))
            hashes = metadata.get("sha256")
    except Exception as error:  # the reader has errors of its own
        raise ValueError(
            f"{path} is no whole shard of features ({error}); delete it and extract again."
        ) from error
    size = path.stat().st_size
    found = {"file": path.name, "bytes": size, "images": images, "skipped": skipped}
    if hashes is not None:
        found["sha256"] = hashlib.sha256(hashes.encode()).hexdigest()
    return found


def verify_shard(path: Path, described: Mapping[str, Any]) -> None:
    """Read a whole shard, and compare it with what was written.

    Args:
        path: of the shard. described: what the manifest says of it.

    Raises:
        ValueError: if it is damaged, another one, or has no hashes to compare with.
    """
    now = describe_shard(path)
    with safe_open(path, "pt") as file:
        hashes = json.loads(file.metadata().get("sha256", "{}"))
        names = set(file.keys())
        changed = [
            name
            for name, wanted in hashes.items()
            if name not in names
            or hashlib.sha256(_bytes(file.get_tensor(name))).hexdigest() != wanted
        ]
    if not hashes:
        raise ValueError(
            f"{path} was written by an earlier version, without hashes; extract again to have them,"
            " or do not verify."
        )
    if changed or set(hashes) != names or now != described:
        told = ", ".join(changed) or "what the manifest says of it"
        raise ValueError(
            f"{path} is not as it was written ({told} differs): copy it again, or delete it and"
            " the manifest, and continue `ocvtp extract` with the settings that it was begun with."
        )


def shard_name(split: str, number: int) -> str:
    """The file of a shard."""
    return f"{split}-{number:05d}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What a folder of features holds.

    Args:
        folder: where its files are.
        settings: what it was made with: `tower` (what the encoder is), `needs` (what was read of
            it), `dtype`, `views`, `num_heads`, `shard_size`, `weights` (sha256) and `splits`.
        shards: of each split, as `describe_shard` says.
    """

    folder: Path
    settings: dict[str, Any]
    shards: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The manifest of a folder; its shards must be there in their sizes.

        Raises:
            ValueError: if it is not there, not finished, damaged, or of a newer format.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            begun = (folder / SETTINGS).is_file()
            raise ValueError(
                f"{folder} holds {'unfinished' if begun else 'no'} features ({MANIFEST} is"
                f" missing); {'continue' if begun else 'make them with'} `ocvtp extract --config"
                f" CONFIG --output {folder}`."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            number, settings, shards = (content[k] for k in ("format", "settings", "shards"))
            if number != FORMAT:
                raise ValueError(
                    f"its format is {number!r}, and this version of ocvtp reads {FORMAT}"
                )
            _check_settings(settings)
            files = []
            for shard in [*shards["train"], *shards.get("validation", ())]:
                name = checked("file", shard["file"], str)
                check_inside(name, folder, "file")
                files.append((name, checked("bytes", shard["bytes"], int)))
                if not all(type(path) is str for _, path in shard["images"]):
                    raise ValueError(f"images of {name} are not pairs of an id and a path")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no manifest of features that can be read ({type(error).__name__}:"
                f" {error}); extract again."
            ) from error
        for name, size in files:
            there = (folder / name).stat().st_size if (folder / name).is_file() else None
            if there != size:
                state = "is missing" if there is None else f"has {there} bytes, not {size}"
                raise ValueError(
                    f"{folder / name} {state}: copy it again, or delete it and {path} and continue"
                    " `ocvtp extract` with the settings that it was begun with."
                )
        return cls(folder, settings, shards)

    def write(self) -> None:
        """Put it beside the shards: the folder is finished."""
        content = {"format": FORMAT, "settings": self.settings, "shards": self.shards}
        with replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")

    def verify(self) -> None:
        """Read all shards, and compare them with what was written.

        Raises:
            ValueError: see `verify_shard`.
        """
        for shard in (shard for shards in self.shards.values() for shard in shards):
            verify_shard(self.folder / shard["file"], shard)

    def num_images(self, split: str) -> int:
        """Readable images of a split, 0 where it is not there."""
        return sum(len(shard["images"]) for shard in self.shards.get(split, ()))


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise what is wrong with those of a manifest that readers look at."""
    known, tower = {field.name for field in fields(Needs)}, settings["tower"]
    of_fields(Needs, {name: value for name, value in settings["needs"].items() if name in known})
    checked("tower.grid_hw", tower["grid_hw"], tuple[int, int], (1, 2**14))
    for name, value, kind in (
        ("needs.hidden[0]", settings["needs"]["hidden"][0], int),
        ("tower.id", tower["id"], object),
        ("tower.layout", tower["layout"], Layout),
        ("num_heads", settings["num_heads"], int | None),
        ("views", settings["views"], tuple[str, ...]),
        ("views[0]", settings["views"][0], str),
        ("splits.train.instances", settings["splits"]["train"]["instances"], bool),
    ):
        checked(name, value, kind)
    for split in settings["splits"].values():
        checked("instances", split.get("instances", False), bool)


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write what a folder is made with, or check that it is continued with the same.

    Raises:
        ValueError: names every setting that differs.
    """
    path, settings = folder / SETTINGS, plain(settings)
    if not path.is_file():
        if any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{folder} holds safetensors but no {SETTINGS}, so they came from elsewhere; pass"
                " another folder."
            )
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); pass another folder.") from error
    if told := list(differences("", found, settings)):
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(told)}. Pass the same ones, or"
            " another folder."
        )


def differences(name: str, there: Any, here: Any) -> Iterator[str]:
    """What differs between two JSON-able values, by the names of its parts."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in dict.fromkeys((*there, *here)):
            inner = f"{name}.{key}".removeprefix(".")
            yield from differences(inner, there.get(key), here.get(key))
    elif there != here:
        yield f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 of the names, shapes, kinds and values of all weights of a module."""
    digest = hashlib.sha256()
    for name, values in sorted(module.state_dict().items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(_bytes(values.detach().cpu().contiguous()))
    return digest.hexdigest()


def _bytes(values: Tensor) -> Any:
    """Of a contiguous tensor on the CPU; shares its memory."""
    return memoryview(values.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def tensor_name(kind: str, key: Any) -> str:
    """E.g. `hidden.9`, `attention.22.cls`."""
    return ".".join(map(str, (kind, *(key if isinstance(key, tuple) else (key,)))))


def tensor_key(name: str) -> tuple[str, Any]:
    """What `tensor_name` was given."""
    kind, number, *rest = name.split(".")
    return kind, (int(number), rest[0]) if rest else int(number)


def ends(counts: Sequence[int] | Tensor) -> Tensor:
    """[R + 1] where each of R runs starts, and where the last one ends."""
    counts = torch.as_tensor(counts, dtype=torch.int64)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
