"""Parts of a training by name: what each kind is made of, and where it is found."""

from __future__ import annotations

import inspect
import re
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import yaml

from ocvtp import plugins
from ocvtp.field_types import no_such
from ocvtp.selectors.schedules import Schedule

GROUP = "ocvtp.pruners"
"""Of entry points: an installed package registers its parts where it registers its pruners."""


class Part(ABC):
    """Something that a training is put together from.

    A subclass keeps each argument of its constructor as the attribute of its name.
    """

    name: ClassVar[str]

    def settings(self) -> dict[str, Any]:
        """Its arguments, plain to JSON: `build` of its kind makes the same of them.

        Raises:
            ValueError: if it did not keep one.
        """
        arguments = inspect.signature(type(self)).parameters
        if lost := [name for name in arguments if not hasattr(self, name)]:
            raise ValueError(
                f"{type(self).__name__} did not keep its argument {lost[0]!r}; set self.{lost[0]}"
                " in its constructor."
            )
        given = {name: getattr(self, name) for name in arguments}
        return {k: v.plain() if isinstance(v, Schedule) else v for k, v in given.items()}

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({said})"


PartT = TypeVar("PartT", bound=Part)


class Parts(Generic[PartT]):
    """All parts of one kind.

    Args:
        kind: what messages call it, e.g. `loss`.
        base: of all of them.
    """

    def __init__(self, kind: str, base: type[PartT]) -> None:
        self._kind, self._base = kind, base
        self._classes: dict[str, type[PartT]] = {}

    def register(
        self, name: str, check: Callable[[type[PartT]], None] | None = None
    ) -> Callable[[type[PartT]], type[PartT]]:
        """Class decorator: make a class known under `name`.

        Args:
            name: of letters, digits, `-` and `_`.
            check: what else a class must hold; raises a ValueError.

        Raises:
            ValueError: if the name is taken or is none, or the class is none of this kind or lacks
                a method.
        """
        kind, base = self._kind, self._base
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{kind} name {name!r} is none; pass letters, digits, - and _.")

        def add(cls: type[PartT]) -> type[PartT]:
            home = f"{base.__module__}.{base.__name__}"
            if not (isinstance(cls, type) and issubclass(cls, base)):
                raise ValueError(f"{cls!r} is no {base.__name__}; derive it from {home}.")
            if name in self._classes:
                raise ValueError(f"{kind} {name!r} is registered already; choose another name.")
            if absent := sorted(cls.__abstractmethods__):
                raise ValueError(
                    f"{kind} {name!r} lacks {', '.join(absent)}; define what is missing."
                )
            if check is not None:
                check(cls)
            cls.name = name
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """Sorted, those of installed packages among them."""
        plugins.load_installed(GROUP)
        return sorted(self._classes)

    def find(self, name: str) -> type[PartT]:
        """The class registered under `name`.

        Raises:
            ValueError: if there is none; names close ones.
        """
        known = self.names()
        if name not in known:
            hint = no_such(str(name), known, 3, ";")
            raise ValueError(
                f"unknown {self._kind} {name!r}{hint} Known: {', '.join(known)}; one of your own"
                " is read by `ocvtp --import FILE COMMAND ...`."
            )
        return self._classes[name]

    def build(self, name: str, settings: Mapping[str, Any]) -> PartT:
        """Make one.

        Raises:
            ValueError: for unknown names and settings, and if one that is needed is missing.
        """
        cls = self.find(name)
        parameters = inspect.signature(cls).parameters
        for setting in settings:
            if setting not in parameters:
                hint = no_such(str(setting), parameters)
                takes = f"It takes {', '.join(parameters)}." if parameters else "It takes none."
                raise ValueError(f"{self._kind} {name!r} has no setting {setting!r}{hint} {takes}")
        needed = [p.name for p in parameters.values() if p.default is p.empty]
        if missing := [setting for setting in needed if setting not in settings]:
            raise ValueError(f"{self._kind} {name!r} needs {', '.join(missing)}; pass it by name.")
        return cls(**{setting: spoken(value) for setting, value in settings.items()})


def one_of(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    """One of several words.

    Raises:
        ValueError: for others.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}; pass one of {', '.join(map(repr, allowed))}.")
    return value


def whole(value: Any, name: str, what: str) -> int:
    """The number of something.

    Raises:
        ValueError: for what is no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r}; pass the number of {what}.")
    return value


def flag(value: Any, name: str) -> bool:
    """Yes or no.

    Raises:
        ValueError: for others.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}; pass true or false.")
    return value


def spoken(value: Any) -> Any:
    """What a text of the command line says, where it is a number, a list or the like.

    A single setting of a loss (`--model.losses.ce.weight 0.5`) comes as a text, as no type of it is
    known there.
    """
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    if value.lower() not in ("true", "false", "null") and value[:1] not in ("{", "["):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value
