"""Names that are imported when they are first used: of a package (PEP 562), bound ones, and facts.

A lower module may call a function of a higher one by a name that the package binds: pruners
plug themselves in with `attached`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], parts: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names lie in its modules.

    The package imports the same names under `TYPE_CHECKING`, for type checkers and editors.

    Args:
        package: its `__name__`.
        homes: by name, the module inside the package that holds it.
        parts: modules that are attributes of the package as they stand.
    """

    def get(name: str) -> Any:
        if name in parts:
            return import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, found)  # found without this function from now on
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *parts})

    return get, names


_homes: dict[str, str] = {}


def bind(name: str, home: str) -> None:
    """Say in which module a function is that modules below it call.

    Args:
        name: of the function. home: dotted name of its module.
    """
    _homes[name] = home


def bound(name: str) -> Any:
    """The function that was bound to a name."""
    return getattr(import_module(_homes[name]), name)


class LazyFact:
    """A class attribute that is imported when it is asked for.

    Without an annotation, which would make a dataclass ask at once.

    Args:
        path: dotted name of a module, and the name in it.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        module, _, name = self._path.rpartition(".")
        return getattr(import_module(module), name)
