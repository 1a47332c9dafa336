"""The two files of an exported network: `model.safetensors` and `config.json`.

Written under temporary names and renamed, so that a folder never holds half of one; read without
executing anything. `format` in config.json says whose network it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ocvtp.reporting.files import replacing
from ocvtp.shipped import find_folder

FORMAT_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_AGAIN = "make the folder again with `ocvtp export`"


def write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any], format: str) -> None:
    """Write both files into `folder`."""
    header = {"format": format, "format_version": FORMAT_VERSION}
    text = json.dumps(header | config, indent=2, allow_nan=False) + "\n"
    with replacing(folder / WEIGHTS_NAME) as temporary:
        temporary.write_bytes(weights_file(weights))
    with replacing(folder / CONFIG_NAME) as temporary:
        temporary.write_text(text)


def weights_file(weights: dict[str, Tensor]) -> bytes:
    """The content of model.safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return save(tensors, metadata={"format": "pt"})


def read(
    source: str | Path, format: str, called: str, map_location: str = "cpu", **hub: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read settings and weights from a folder or the hub.

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
        return format, *_rest(source, config, "cpu")


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
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG_NAME} is damaged ({error}); {_AGAIN}.") from error
    return config if isinstance(config, dict) else {}


def _rest(
    source: str | Path, config: dict[str, Any], map_location: str, **hub: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version is {version!r}, this ocvtp reads {FORMAT_VERSION}; upgrade ocvtp"
            " or export the checkpoint again."
        )
    path = _locate(source, WEIGHTS_NAME, **hub)
    try:
        return config, load_file(path, device=map_location)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_NAME} is damaged ({error}); {_AGAIN}.") from error


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
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
    except (
        ValueError,
        TypeError,
        KeyError,
        OSError,
        RuntimeError,
        RecursionError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: {reason[:500]}") from error


def _locate(source: str | Path, name: str, **hub: Any) -> Path:
    folder = Path(find_folder(str(source)))
    if folder.is_dir():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"the folder has no {name}; pass one that `ocvtp export` wrote.")
        return path
    try:
        return Path(hf_hub_download(str(source), name, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{source!s} is neither a folder nor a model id of the hub that can be reached now"
            f" ({type(error).__name__}); pass a folder that `ocvtp export` wrote."
        ) from error
