"""The two files of an exported network: `model.safetensors` and `config.json`.

Written under temporary names and renamed, so that a folder never holds half of one; read without
executing anything. `format` in config.json says whose network it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ocvtp.field_types import shown
from ocvtp.reporting.files import replacing
from ocvtp.shipped import find_weights

FORMAT_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_MOST_CONFIG = 4 * 1024**2  # bytes
_T = TypeVar("_T", bound=nn.Module)
_AGAIN = "make the folder again with `ocvtp export`"


def write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any], format: str) -> None:
    """Write both files into `folder`."""
    header = {"format": format, "format_version": FORMAT_VERSION}
    text = json.dumps(header | config, indent=2, allow_nan=False) + "\n"
    with replacing(folder / WEIGHTS_NAME) as temporary:
        temporary.write_bytes(weights_file(weights))
    with replacing(folder / CONFIG_NAME) as temporary:
        temporary.write_text(text)


@dataclass(frozen=True)
class Weights:
    """The weights of a network, none of which is read yet.

    Args:
        shapes: by name.
        bytes: of all of them.
        load: reads them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    bytes: int
    load: Callable[[], Mapping[str, Tensor]]

    @classmethod
    def of_file(cls, path: Path, map_location: str) -> Weights:
        """Those of a file of safetensors.

        Args:
            path: of the file.
            map_location: device of the weights.

        Raises:
            ValueError: if the file is damaged, by what its header says.
        """
        with _damaged(path), safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

        def load() -> Mapping[str, Tensor]:
            with _damaged(path):
                return load_file(path, device=map_location)

        return cls(shapes, path.stat().st_size, load)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Weights:
        """Those that are in memory."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(
            shapes, sum(t.numel() * t.element_size() for t in tensors.values()), lambda: tensors
        )


def weights_file(weights: dict[str, Tensor]) -> bytes:
    """The content of model.safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return save(tensors, metadata={"format": "pt"})


def read(
    source: str | Path, format: str, called: str, map_location: str = "cpu", **hub: Any
) -> tuple[dict[str, Any], Weights]:
    """Read settings from a folder or the hub, and the header of the weights.

    Args:
        source: folder, or model id of the hub.
        format: the one that it must have.
        called: what has that format, e.g. `an OC-pruner`.
        map_location: device of the weights.
        hub: see `PrunerNetwork.from_pretrained`.

    Raises:
        ValueError: if a file is missing, damaged, of another kind or of a newer format.
    """
    with explained(f"cannot read {called} from {source}"):
        config = _config(source, **hub)
        if config.pop("format", None) != format:
            raise ValueError(
                f'{CONFIG_NAME} lacks "format": "{format}": this is not the export of'
                f" {called}; make one with `ocvtp export`."
            )
        return _rest(source, config, map_location, **hub)


def read_any(source: str | Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Format, settings and weights of a network of any kind.

    Raises:
        ValueError: if a file is missing, damaged or of a newer format.
    """
    with explained(f"cannot read a network from {source}"):
        config = _config(source)
        format = config.pop("format", None)
        if not isinstance(format, str):
            raise ValueError(f'{CONFIG_NAME} lacks "format"; pass what `ocvtp export` wrote.')
        settings, weights = _rest(source, config, "cpu")
        return format, settings, dict(weights.load())


def config_of(source: str | Path, **hub: Any) -> dict[str, Any]:
    """The config.json of a folder or model id; empty where none can be read.

    Args:
        source: folder, or model id of the hub.
        hub: see `PrunerNetwork.from_pretrained`.
    """
    try:
        with explained(""):
            return _config(source, **hub)
    except ValueError:
        return {}


def _config(source: str | Path, **hub: Any) -> dict[str, Any]:
    path = _locate(source, CONFIG_NAME, **hub)
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise ValueError(f"it has more than {_MOST_CONFIG} bytes")
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG_NAME} is damaged ({error}); {_AGAIN}.") from error
    return config if isinstance(config, dict) else {}


def _not_finite(word: str) -> NoReturn:
    raise ValueError(f"it holds {word}")


def _rest(
    source: str | Path, config: dict[str, Any], map_location: str, **hub: Any
) -> tuple[dict[str, Any], Weights]:
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version is {shown(version)}, this ocvtp reads {FORMAT_VERSION}; upgrade ocvtp"
            " or export the checkpoint again."
        )
    return config, Weights.of_file(_locate(source, WEIGHTS_NAME, **hub), map_location)


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged ({error}); {_AGAIN}.") from error


def restore(build: Callable[[], _T], weights: Weights) -> _T:
    """The network of settings, with weights of a file.

    It is built without memory first, to compare it with the shapes of the weights: settings that
    ask for more than the file holds are refused before anything is allocated. A network that cannot
    be built so, as it looks at numbers of its own, is built at once.

    Args:
        build: makes it, of random weights.
        weights: of the file.

    Raises:
        ValueError: if they are not of it, or are not finite.
    """
    held = {n: torch.empty(shape, device="meta") for n, shape in weights.shapes.items()}
    try:
        with torch.device("meta"), _Outline(weights):
            load_weights(build(), held)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
    network, tensors = build(), weights.load()
    load_weights(network, tensors)
    refuse_not_finite(tensors)
    return network


def refuse_not_finite(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights with numbers that are not finite.

    Raises:
        ValueError: names the first such tensor.
    """
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name!r} has numbers that are not finite; train again.")


class _Outline(TorchFunctionMode):
    """Makes tensors without memory, no more than the weights of a file can be made in.

    What fills a tensor is left out: it changes no shape, and where there is no memory random
    numbers take seconds of imports.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._left = 500 + 50 * len(weights.shapes) + weights.bytes // 1024

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError(
                f"{CONFIG_NAME} asks for more layers than {WEIGHTS_NAME} holds; {_AGAIN}."
            )
        if func in (torch.rand, torch.randn):
            return torch.empty(
                *args, **{k: v for k, v in (kwargs or {}).items() if k != "generator"}
            )
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name != "copy_":
            return args[0] if args else next(iter((kwargs or {}).values()))
        return func(*args, **(kwargs or {}))


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a network of config.json the weights of model.safetensors.

    Raises:
        ValueError: if they are not of it.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        first = lines[min(1, len(lines) - 1)].strip()[:200]
        raise ValueError(
            f"{WEIGHTS_NAME} does not fit {CONFIG_NAME}; {_AGAIN} ({first})."
        ) from error


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn everything that a wrong file can raise into one ValueError that begins with `what`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: {reason[:500]}") from error


def _locate(source: str | Path, name: str, **hub: Any) -> Path:
    try:
        folder = Path(find_weights(str(source)))
    except ValueError as error:
        raise _is_nowhere(source, "there is none here") from error
    if folder.is_dir():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"the folder has no {name}; pass one that `ocvtp export` wrote.")
        return path
    try:
        return Path(hf_hub_download(str(source), name, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise _is_nowhere(source, type(error).__name__) from error


def _is_nowhere(source: str | Path, why: str) -> ValueError:
    return ValueError(
        f"{source!s} is neither a folder nor a model id of the hub that can be reached now ({why});"
        " pass a folder that `ocvtp export` wrote."
    )
