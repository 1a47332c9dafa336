"""VisionSelector's released scorer -> artifact.

Two linear maps (https://arxiv.org/abs/2510.16598): the queries and the keys of `qk_mean`, inside of
the model that they were trained in, or apart. All sizes follow from the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ocvtp.export.checkpoint import save
from ocvtp.hosts.loading import load_config
from ocvtp.hosts.origin import origin_of
from ocvtp.hosts.registry import find_host
from ocvtp.learning.artifact import explained
from ocvtp.random_models.weights import materialise
from ocvtp.selectors.network import SelectorConfig, SelectorNetwork
from ocvtp.slots.tensor_file import load_tensors

# official prefix -> ours
_NAMES = {"q_proj.": "to_query.", "k_proj.": "to_key."}
_HOLDER = re.compile(r"(?:.*\.)?importance_scorer\.")
"""Before the names of the scorer in a whole model."""
_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod)\.)+")
"""Before them where it was saved apart."""


def export_official_selector(
    weights: str | Path, output: str | Path, model: str
) -> SelectorNetwork:
    """Write `model.safetensors` and `config.json` of VisionSelector's released scorer.

    Args:
        weights: a file of safetensors or of `torch.save` that holds the scorer, alone or inside of
            a whole model; or a folder of the first kind, which may be its parts.
        output: folder to write; made if it is not there.
        model: the model that it was trained in, or the one that it was made from: a folder or a hub
            id, of which the configuration alone is read; see `ocvtp.hosts.loading.load_config`.

    Raises:
        ValueError: if the scorer is not there, is another, is not finite, or is of another width
            than the model. Nothing is written then.
    """
    state = _read(Path(weights))
    with explained(f"{weights} is not the scorer of VisionSelector"):
        tensors = _renamed(state)
        dim, width = tensors["to_query.weight"].shape
    host = find_host(materialise(load_config(model), device="meta"))
    origin = origin_of(host, model)
    if width != origin["widths"].projected:
        raise ValueError(
            f"{weights} reads tokens of a width of {width}, and the language model of {model} has"
            f" {origin['widths'].projected}; pass the model that it was trained in."
        )
    network = SelectorNetwork(
        SelectorConfig(
            scorer="qk_mean",
            sizes={"dim": dim},
            positions="original",
            relaxation={"name": "soft_topk", "tau": 1.0},
            gate={"name": "scale"},
            losses={"ce": {}, "binary": {}},
            objective="visionselector",
            training={"source": "the authors' released weights"},
            **origin,
        )
    )
    network.scorer.load_state_dict(tensors)
    return save(network, output, with_decoder=False)


def _renamed(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The scorer's tensors by our names, in fp32.

    Raises:
        ValueError: for names that are missing or left over, and shapes that do not fit.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix = next((own for own in _NAMES if name.startswith(own)), None)
        if prefix is None or not isinstance(tensor, Tensor):
            raise ValueError(f"unknown entry {name!r}; there are q_proj and k_proj alone.")
        found[_NAMES[prefix] + name.removeprefix(prefix)] = tensor.float()
    wanted = [f"{ours}{part}" for ours in _NAMES.values() for part in ("weight", "bias")]
    missing = sorted(set(wanted) - found.keys())
    if missing or len(found) > len(wanted):
        left = sorted(found.keys() - set(wanted))
        raise ValueError(f"missing {missing}, left over {left} (in this library's names).")
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    whole = shapes["to_query.weight"]
    expected = [whole, whole[:1]] * len(_NAMES)
    if len(whole) != 2 or 0 in whole or [shapes[name] for name in wanted] != expected:
        raise ValueError(f"its shapes {shapes} are not those of two equal linear maps.")
    if broken := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{broken[0]!r} has numbers that are not finite.")
    return found


def _read(path: Path) -> dict[str, Any]:
    """The entries of the scorer by their own names; of several files all together.

    Raises:
        ValueError: for files that cannot be read, and if several entries have one name.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no .safetensors file in it; pass the file with the scorer.")
    entries = [entry for file in files for entry in _entries(file)]
    is_inside = any(_HOLDER.match(name) for name, _ in entries)
    before = _HOLDER if is_inside else _WRAPPERS
    found: dict[str, Any] = {}
    for name, content in entries:
        if is_inside and not _HOLDER.match(name):
            continue
        own = before.sub("", name, count=1)
        if own in found:
            raise ValueError(f"{path} has several entries {own!r}; pass a file of one scorer.")
        found[own] = content()
    return found


def _entries(file: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names in a file, each with what reads its tensor."""
    if file.suffix != ".safetensors":
        for name, content in load_tensors(file).items():
            yield str(name), partial(_same, content)
        return
    if not file.is_file():
        raise ValueError(f"{file} does not exist; pass the path of a file.")
    try:
        opened: Any = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged, or no file of safetensors ({error}).") from error
    for name in opened.keys():  # noqa: SIM118 - it is no dictionary
        yield name, partial(opened.get_tensor, name)


def _same(content: Any) -> Any:
    return content
