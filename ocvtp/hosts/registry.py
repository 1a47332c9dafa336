"""Which models pruners can be put into: the adapters, and how the model to adapt is found.

A new family is an adapter in a file of its own and a line of `choices.FAMILIES`; one from outside
is registered with `register_host`. A package says where its adapters are by an entry point of group
`ocvtp.hosts`. See docs/add-a-host.md.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from ocvtp import plugins
from ocvtp.choices import FAMILIES
from ocvtp.hosts.base import Host, Savings, Tiling
from ocvtp.hosts.in_llm import hooks
from ocvtp.pruners import Compose, Pruner
from ocvtp.pruners.base import naming
from ocvtp.pruners.layer_pruner import LayerPruner

HOSTS: dict[str, type[Host]] = {}
"""Adapters by the name of their family; `hosts()` also finds those of installed packages."""
GROUP = "ocvtp.hosts"
"""The group of entry points."""
_H = TypeVar("_H", bound=type[Host])


def register_host(name: str) -> Callable[[_H], _H]:
    """Class decorator: make the adapter of a model family known.

    Args:
        name: of the family; `random:tiny-NAME` is its `tiny` model, where it has one.

    Raises:
        ValueError: if the name, or one of the `model_types`, is taken.
    """

    def add(cls: _H) -> _H:
        if name in HOSTS:
            raise ValueError(f"host {name!r} is registered already; choose another name.")
        for other in HOSTS.values():
            if taken := set(cls.model_types) & set(other.model_types):
                raise ValueError(
                    f"host {name!r} serves model_type {', '.join(sorted(taken))}, as"
                    f" {other.name!r} does; a model_type has one host."
                )
        cls.name = name
        HOSTS[name] = cls
        return cls

    return add


for _name, _home in FAMILIES.items():
    _module, _, _class = _home.partition(".")
    register_host(_name)(getattr(import_module(f"ocvtp.hosts.families.{_module}"), _class))


def hosts() -> dict[str, type[Host]]:
    """Adapters by the name of their family, those of installed packages included.

    Raises:
        ValueError: if one of these cannot be imported.
    """
    plugins.load_installed(GROUP)
    return HOSTS


def host_class(model_type: str | None) -> type[Host] | None:
    """The adapter of a `model_type`; None if there is none."""
    return next((host for host in hosts().values() if model_type in host.model_types), None)


def find_host(model: Any, tiling: Tiling | None = None, savings: Savings | None = None) -> Host:
    """The adapter of a model.

    Args:
        model: a supported transformers VLM, or what holds one; see `unwrap`.
        tiling: how to prune images that the model cuts into tiles.
        savings: what need not run.

    Raises:
        ValueError: if its `model_type` is not supported.
    """
    model = unwrap(model)
    if (host := _host_of(model)) is not None:
        return host(model, tiling, savings)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    supported = ", ".join(sorted(t for host in HOSTS.values() for t in host.model_types))
    raise ValueError(
        f"{type(model).__name__} (model_type={kind!r}) is not supported; pass a transformers"
        f" ...ForConditionalGeneration of model_type {supported}."
    )


def _host_of(model: Any) -> type[Host] | None:
    """The adapter of the model itself, not of one that it holds: wrappers forward attributes."""
    from transformers import PreTrainedModel

    if not (isinstance(model, PreTrainedModel) and hasattr(model, "generate")):
        return None
    return host_class(model.config.model_type)


def unwrap(model: Any) -> Any:
    """The one supported transformers model in a wrapper of any kind.

    PEFT, DDP, FSDP, torch.compile, Fabric, DeepSpeed, a LightningModule: modules, or other objects
    that hold one.

    Returns:
        the model itself; what was given, if it holds none.

    Raises:
        ValueError: if there are several.
    """
    found, seen, queue = dict[str, Any](), set[int](), [("", model)]
    for path, holder in queue:  # grows
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if _host_of(holder) is not None:
            found[path] = holder
            continue
        held = dict(getattr(holder, "__dict__", {}))
        held |= held.get("_modules") or {} if isinstance(holder, nn.Module) else {}
        parts = {name: part for name, part in held.items() if isinstance(part, nn.Module)}
        queue += [(f"{path}.{name}", part) for name, part in parts.items()]
    if len(found) > 1:
        names = ", ".join(f"{path} ({type(one).__name__})" for path, one in found.items())
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} models that a pruner could be attached to:"
            f" {names}; pass the one that is meant."
        )
    return next(iter(found.values()), model)


def check(host: Host, pruner: Pruner | Compose) -> None:
    """Refuse a pruner that a host cannot serve.

    Raises:
        ValueError: that names the alternative.
    """
    for part in pruner.parts:
        if part.stage not in host.stages:
            raise ValueError(
                f"pruner {part.name!r} acts at stage {part.stage!r}; the host of"
                f" {host.model.config.model_type!r} serves {', '.join(host.stages)}:"
                " pass a pruner of one of these (see `ocvtp list`)."
            )
        if isinstance(part, LayerPruner):
            hooks.check(host, part)
        elif part.stage == "llm_layers":
            raise ValueError(
                f"pruner {part.name!r} acts at stage 'llm_layers', but is no LayerPruner; derive it"
                " from ocvtp.pruners.LayerPruner."
            )
        with naming(part.name):
            host.check(part.tower_needs)
