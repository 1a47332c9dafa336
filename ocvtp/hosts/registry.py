"""Which models pruners can be put into: the adapters, and how the model to adapt is found.

A new family is an adapter in a file of its own and its class in `HOSTS`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ocvtp.hosts.base import Host, Savings, Tiling
from ocvtp.hosts.families.internvl import InternVLHost
from ocvtp.hosts.families.llava import LlavaHost
from ocvtp.hosts.families.llava_next import LlavaNextHost
from ocvtp.hosts.families.llava_onevision import LlavaOnevisionHost
from ocvtp.hosts.families.qwen_vl import Qwen2VLHost, Qwen3VLHost, Qwen25VLHost
from ocvtp.hosts.in_llm import hooks
from ocvtp.pruners import Compose, Pruner
from ocvtp.pruners.layer_pruner import LayerPruner

HOSTS: tuple[type[Host], ...] = (
    LlavaHost,
    LlavaNextHost,
    LlavaOnevisionHost,
    Qwen2VLHost,
    Qwen25VLHost,
    Qwen3VLHost,
    InternVLHost,
)


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
    supported = ", ".join(sorted(t for host in HOSTS for t in host.model_types))
    raise ValueError(
        f"{type(model).__name__} (model_type={kind!r}) is not supported; pass a transformers"
        f" ...ForConditionalGeneration of model_type {supported}."
    )


def _host_of(model: Any) -> type[Host] | None:
    """What adapts a model itself, and not one that it holds: wrappers forward attributes."""
    from transformers import PreTrainedModel

    if not (isinstance(model, PreTrainedModel) and hasattr(model, "generate")):
        return None
    kind = model.config.model_type
    return next((host for host in HOSTS if kind in host.model_types), None)


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
        host.check(part.tower_needs)
