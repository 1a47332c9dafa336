"""What torch.compile and accelerate make of modules: compiled, or away from their device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

_P = ParamSpec("_P")
_T = TypeVar("_T")


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile wraps a module or a part of it: it may ignore hooks that come later."""
    return any(_is_wrapped(part) for part in module.modules())


def _is_wrapped(module: nn.Module) -> bool:
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or any("_orig_mod" in held for held in (vars(module), module._modules))


@contextmanager
def on_device(module: Any) -> Iterator[None]:
    """Bring a module that accelerate offloads to its device, for calls of other methods."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)


def uncompiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`torch.compiler.disable`, which imports the compiler, at the first call and not before.

    Models of transformers import it themselves; a command that needs no model should not wait.
    """
    disabled: list[Callable[_P, _T]] = []

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call
