"""Pruners by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from math import isnan
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args

from ocvtp import plugins
from ocvtp.field_types import hints, no_such, plain, real_number, shown
from ocvtp.pruners.base import Pruner
from ocvtp.pruners.budgets import BUDGETS
from ocvtp.structures import Stage

_REGISTRY: dict[str, type[Pruner]] = {}
_P = TypeVar("_P", bound=type[Pruner])
GROUP = "ocvtp.pruners"
"""Of entry points."""
_BUDGETS = (*BUDGETS, "stages")


def register(name: str) -> Callable[[_P], _P]:
    """Class decorator: make a pruner known under `name`, its file's name.

    Raises:
        ValueError: if the name is taken.
    """

    def add(cls: _P) -> _P:
        if name in _REGISTRY:
            raise ValueError(f"pruner {name!r} is registered already; choose another name.")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def list_pruners(stage: Stage | None = None) -> list[str]:
    """Names of all registered pruners, sorted; or of those of one `Pruner.stage`."""
    plugins.load_installed(GROUP)
    return sorted(name for name, cls in _REGISTRY.items() if stage in (None, cls.stage))


def pruner_class(name: str) -> type[Pruner]:
    """The class registered under `name`.

    Raises:
        ValueError: if there is none; names close ones.
    """
    plugins.load_installed(GROUP)
    if name not in _REGISTRY:
        hint = no_such(name, _REGISTRY, 3, "; see `ocvtp list`.")
        raise ValueError(f"unknown pruner {shown(name)}{hint} Known: {', '.join(list_pruners())}.")
    return _REGISTRY[name]


def build_pruner(name: str, **settings: Any) -> Pruner:
    """Make a pruner, e.g. `build_pruner("fastervlm", num_keep=64)`.

    Args:
        name: see `list_pruners()`.
        settings: `num_keep`, `keep_ratio` or `max_keep`, and the method's own parameters; or
            `setting`, the name of a published one in place of a budget, e.g. `paper-64` of
            `sparsevlm`.

    Raises:
        ValueError: for unknown names and settings.
    """
    cls = pruner_class(name)
    return cls(**checked_settings(cls, settings))


def checked_settings(cls: type[Pruner], settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments that settings of a pruner stand for, in plain numbers.

    Raises:
        ValueError: for names that it does not take, and for values of another kind.
    """
    name, known = cls.name, [f.name for f in fields(cls) if f.init]
    if takes_named_setting(cls):
        settings = _with_named(cls, **settings)
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"pruner {name!r} has no setting {shown(setting)}{no_such(setting, known)} It takes"
                f" {', '.join(known)}."
            )
    settings = {name: plain(value) for name, value in settings.items()}
    _check_kinds(cls, settings)
    return settings


def _check_kinds(cls: type[Pruner], settings: dict[str, Any]) -> None:
    """Refuse a text or a fraction where a method counts, and the like; budgets say more themselves.

    Raises:
        ValueError: that names the setting and what it may be.
    """
    kinds = hints(cls)
    for name in settings.keys() & kinds.keys() - {*_BUDGETS}:
        options = _options(kinds[name])
        if not _is_of(settings[name], options):
            wanted = " or ".join(_KINDS.get(option, "None") for option in options)
            raise ValueError(
                f"pruner {cls.name!r} got {name}={shown(settings[name])}; pass {wanted}."
            )


_KINDS: dict[Any, str] = {bool: "True or False", int: "a whole number", float: "a number"}
_KINDS |= {str: "a text"}


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _is_of(value: Any, options: tuple[Any, ...]) -> bool:
    """Whether a value is of a kind of number, or a text; of other kinds all are."""
    if not all(option in _KINDS or option is NoneType for option in options):
        return True
    if value is None or isinstance(value, bool):
        return type(value) in options
    if isinstance(value, str | PathLike):
        return str in options
    if isinstance(value, Integral):
        return int in options or (float in options and real_number(value) is not None)
    return float in options and isinstance(value, Real) and not isnan(value)


def takes_named_setting(cls: type[Pruner]) -> bool:
    """Whether `setting` is the name of a published one, and no parameter of a method's own."""
    return "setting" not in (f.name for f in fields(cls))


def _with_named(cls: type[Pruner], setting: Any = None, **given: Any) -> dict[str, Any]:
    """The arguments of a named setting, and those given with it."""
    if setting is None:
        return given
    known = cls.named_settings
    if not known:
        raise ValueError(
            f"pruner {cls.name!r} has no published settings; pass num_keep or keep_ratio in place"
            f" of setting={setting!r}."
        )
    if not isinstance(setting, str) or setting not in known:
        raise ValueError(
            f"pruner {cls.name!r} has no published setting {shown(setting)}; pass one of"
            f" {', '.join(known)}, or num_keep or keep_ratio. {cls.settings_note}".rstrip()
        )
    named = dict(known[setting])
    if twice := [k for k, v in given.items() if v is not None and k in (*_BUDGETS, *named)]:
        passed = ", ".join(f"{k}={v!r}" for k, v in named.items()) or "the paper's own budget"
        raise ValueError(
            f"pruner {cls.name!r} got setting={setting!r} and {' and '.join(twice)}; pass one of"
            f" them: the setting stands for {passed}."
        )
    return {k: v for k, v in given.items() if k not in _BUDGETS} | named
