"""What the model without a head runs in place of its forward(): trainers and embedders call it."""

from __future__ import annotations

from typing import Any

from ocvtp.hosts.runtime.calls import STATE, State, brings_images, by_name, pruned
from ocvtp.hosts.wrap_methods import Original
from ocvtp.transformers_names import name_cache


def forward(module: Any, original: Original, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`module.forward`, images pruned; calls without images pass, as those of the model around it.

    Args:
        module: that has no head.
        original: its own.
        model: around it, that a pruner is attached to.
        args: of the call. kwargs: of the call.
    """
    state: State = model.__dict__[STATE]
    if len(args) < 2 and not brings_images(kwargs):
        return original(*args, **kwargs)
    kwargs = name_cache(by_name(module, "forward", args, kwargs), state.cache_name)
    if not brings_images(kwargs):
        return original(**kwargs)
    return pruned(state, module, original, kwargs)
