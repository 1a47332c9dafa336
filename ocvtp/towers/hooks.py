"""Hooks that are not in their modules yet: where they go is known before, and can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn


class Removable(Protocol):
    """What was put into a model."""

    def remove(self) -> None:
        """Take it out; may be called more than once."""


@dataclass(frozen=True, eq=False)
class Hook:
    """What goes into one module.

    Args:
        module: the one that it goes into.
        put: puts it there.
    """

    module: nn.Module
    put: Callable[[], Removable]


def before(module: nn.Module, function: Callable[..., Any], **options: Any) -> Hook:
    """A hook before a module's forward; see `torch.nn.Module.register_forward_pre_hook`."""
    return Hook(module, partial(module.register_forward_pre_hook, function, **options))


def after(module: nn.Module, function: Callable[..., Any], **options: Any) -> Hook:
    """A hook after a module's forward; see `torch.nn.Module.register_forward_hook`."""
    return Hook(module, partial(module.register_forward_hook, function, **options))


def put(hooks: Iterable[Hook]) -> list[Removable]:
    """Put hooks into their modules; the result takes them out."""
    return [hook.put() for hook in hooks]


@contextmanager
def placed(hooks: Iterable[Hook]) -> Iterator[None]:
    """Inside the block hooks are in their modules."""
    there = put(hooks)
    try:
        yield
    finally:
        for hook in there:
            hook.remove()
