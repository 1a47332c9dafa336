"""What the model without a head runs in place of its forward(): trainers and embedders call it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ocvtp.hosts.calls import STATE, State, brings_images, by_name, pruned
from ocvtp.transformers_names import name_cache


def forward(
    module: Any, before: Callable[..., Any] | None, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """`module.forward`, images pruned; calls without images pass, as those of the model around it.

    Args:
        module: that has no head.
        before: what stood in its `__dict__`.
        model: around it, that a pruner is attached to.
        args: of the call. kwargs: of the call.
    """
    state: State | None = model.__dict__.get(STATE)
    original = before or partial(type(module).forward, module)
    if state is None or (len(args) < 2 and not brings_images(kwargs)):
        return original(*args, **kwargs)
    kwargs = name_cache(by_name(module, "forward", args, kwargs), state.cache_name)
    if not brings_images(kwargs):
        return original(**kwargs)
    return pruned(state, module, original, kwargs)
