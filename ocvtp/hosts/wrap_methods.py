"""Bound methods that run in the place of a model's or module's own, and their removal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any
from uuid import uuid4

_METHODS = "_ocvtp_methods"

Original = Callable[..., Any]
"""The method that a function replaces, bound to its module."""


@dataclass(frozen=True)
class _Standing:
    """What runs in the place of a method of one module.

    Args:
        name: of the method.
        function: gets the module, what it replaces, `given`, and the arguments of the call.
        given: more that the function gets.
        before: what was in the module's `__dict__`, e.g. of accelerate.
        method: what is there now, a function of the module.
        innermost: the same below all decorators, ours included, and below `before`.
    """

    name: str
    function: Callable[..., Any]
    given: tuple[Any, ...]
    before: Original | None
    method: Callable[..., Any] = field(repr=False)
    innermost: Callable[..., Any] = field(repr=False)


class _Methods:
    """All that replaces methods of one module; it is copied and pickled with the module.

    A bound method is pickled as the name of an attribute of its module, and a module that is being
    unpickled has only those of its class. So this comes before the methods in the module's
    `__dict__`, and puts them there first.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.standing: dict[str, _Standing] = {}

    def put(self, key: str, name: str, function: Any, given: Any, before: Any) -> None:
        """Replace a method by `function`."""
        method, innermost = _functions(type(self.module), name, key)
        standing = _Standing(name, function, given, before, method, innermost)
        self.standing[key] = standing
        self.module.__dict__[name] = method.__get__(self.module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Methods:
        made = memo[id(self)] = _Methods.__new__(_Methods)
        made.module = deepcopy(self.module, memo)
        made.standing = deepcopy(self.standing, memo)
        return made

    def __getstate__(self) -> dict[str, Any]:
        found = {k: (s.name, s.function, s.given, s.before) for k, s in self.standing.items()}
        return {"module": self.module, "found": found}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])  # type: ignore[misc]
        self.module.__dict__[_METHODS] = self
        for key, parts in state["found"].items():
            self.put(key, *parts)


def _functions(cls: type, name: str, key: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`method` and `innermost` of the entry `key`, see `_Standing`.

    They hold no module: copies of a module have their own in the same functions.
    """
    own = getattr(cls, name)

    def find(module: Any) -> _Standing | None:
        methods: _Methods | None = module.__dict__.get(_METHODS)
        return None if methods is None else methods.standing.get(key)

    @wraps(own)
    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        standing = find(self)
        if standing is None:  # removed, but a caller kept it
            return own(self, *args, **kwargs)
        original = standing.before or partial(own, self)
        return standing.function(self, original, *standing.given, *args, **kwargs)

    def innermost(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        standing, original = find(self), partial(inspect.unwrap(own), self)
        if standing is None:
            return original(*args, **kwargs)
        function = inspect.unwrap(standing.function)
        return function(self, original, *standing.given, *args, **kwargs)

    innermost.__name__, innermost.__doc__ = name, own.__doc__
    innermost.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    method.__wrapped__ = innermost  # type: ignore[attr-defined]
    return method, innermost


class Wrapped:
    """A method of one module, replaced by a function.

    It is a bound method like the module's own: `__wrapped__`, to which others unwrap it, runs the
    function too, around the module's own method without its decorators.

    Args:
        function: it gets the module, what it replaces, `given`, and the arguments of the call.
        module: whose method it is.
        given: more that the function gets.
        name: of the method; None if it is the function's.
    """

    def __init__(
        self, function: Callable[..., Any], module: Any, *given: Any, name: str | None = None
    ) -> None:
        self._module, self._key = module, uuid4().hex
        self._name = function.__name__ if name is None else name
        before = module.__dict__.pop(self._name, None)
        methods = module.__dict__.setdefault(_METHODS, _Methods(module))
        methods.put(self._key, self._name, function, given, before)

    def is_lost(self) -> bool:
        """Whether the module's own method is back in its place."""
        return _is_own(self._module, self._name)

    def remove(self) -> None:
        """Put back what was there; if others have wrapped this since, it stays and does nothing."""
        self.sweep(self._module)

    def sweep(self, module: Any) -> None:
        """Take it out of the module that it was put into, or of a copy of that."""
        attributes = module.__dict__
        methods: _Methods | None = attributes.get(_METHODS)
        standing = None if methods is None else methods.standing.get(self._key)
        if methods is None or standing is None:
            return
        name, before = self._name, standing.before
        current = attributes.get(name)
        function = getattr(current, "__func__", None)
        if function is standing.method or function is standing.innermost:
            del attributes[name]
            if before is not None and function is standing.method:
                attributes[name] = before
        elif not (before is None or current is before or _is_own(module, name)):
            methods.standing[self._key] = replace(standing, function=_pass, given=())
            return
        del methods.standing[self._key]
        if not methods.standing:
            del attributes[_METHODS]


def has_methods(module: Any) -> bool:
    """Whether any method of a module is replaced."""
    return _METHODS in module.__dict__


def any_lost(found: Iterable[Any]) -> bool:
    """Whether the module's own method is back in the place of one that is `Wrapped`."""
    return any(put.is_lost() for put in found if isinstance(put, Wrapped))


def _is_own(module: Any, name: str) -> bool:
    """Whether a module has no other method of this name than its class's."""
    current = module.__dict__.get(name)
    return current is None or getattr(current, "__func__", None) is getattr(type(module), name)


def _pass(module: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)
