"""What caches of results must know of a pruner, besides the image and the budget."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from ocvtp import __version__
from ocvtp.hosts.base import Tiling
from ocvtp.pruners import Pruner
from ocvtp.pruners.budgets import BUDGETS

_PLAIN = (str, int, float, bool, type(None), tuple, list, dict)
_SHOWN = 16  # digits


def identity_of(pruner: Pruner, tiling: Tiling) -> str:
    """A short text that is the same only for pruners that choose alike at equal budgets.

    It knows the method, its settings, the weights of its network (wherever they were read from),
    how images in tiles are pruned, and the version of this package.
    """
    digest = hashlib.sha256()
    settings: dict[str, Any] = {"pruner": pruner.name, "version": __version__, **vars(tiling)}
    network = any(isinstance(value, nn.Module) for value in vars(pruner).values())
    for name, value in sorted(vars(pruner).items()):
        if isinstance(value, nn.Module):
            settings[name] = repr(getattr(value, "config", None))
            for key, weight in sorted(value.state_dict().items()):
                _add(digest, f"{name}.{key}", weight)
        elif isinstance(value, Tensor):
            _add(digest, name, value)
        elif isinstance(value, _PLAIN) and name not in BUDGETS:
            settings[name] = None if network and name == "checkpoint" else repr(value)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:_SHOWN]


def _add(digest: Any, name: str, values: Tensor) -> None:
    plain = values.detach().cpu().contiguous()
    digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
