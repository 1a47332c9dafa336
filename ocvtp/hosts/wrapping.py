"""Instance attributes that stand for methods of a model or module, and their removal."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol


class Removable(Protocol):
    """What was put into a model."""

    def remove(self) -> None:
        """Take it out; may be called more than once."""


class Wrapper(partial):  # type: ignore[type-arg]
    """`partial(function, module, before, ...)` with the signature of the method it stands for.

    generate() inspects forward's parameters; and a partial copies and pickles with its model.
    """

    @property
    def before(self) -> Callable[..., Any] | None:
        """What stood in the module's `__dict__` before, e.g. of accelerate."""
        before: Callable[..., Any] | None = self.args[1]
        return before

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        return inspect.signature(getattr(type(module), self.func.__name__).__get__(module))


class Wrapped:
    """A method of one module that a function stands for.

    Args:
        function: named like the method; it gets the module, what stood in its `__dict__` before or
            None, `given`, and the arguments of the call.
        module: whose method it is.
        given: more that the function gets.
    """

    def __init__(self, function: Callable[..., Any], module: Any, *given: Any) -> None:
        self._attributes, self._name = module.__dict__, function.__name__
        self._wrapper = Wrapper(function, module, self._attributes.get(self._name), *given)
        self._attributes[self._name] = self._wrapper

    def remove(self) -> None:
        """Put back what stood there; what somebody else has wrapped meanwhile stays, and passes."""
        if self._attributes.get(self._name) is not self._wrapper:
            return
        del self._attributes[self._name]
        if self._wrapper.before is not None:
            self._attributes[self._name] = self._wrapper.before
