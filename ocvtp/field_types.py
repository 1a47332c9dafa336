"""Values of files and command lines made into a dataclass: of each field's type, in its range.

The annotation of a field is its type. A range is in the class's `ranges`, by the field's name:

    @dataclass(frozen=True)
    class Sizes:
        ranges: ClassVar[Ranges] = {"dim": (1, 4096)}

        dim: int = 64
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from math import isfinite
from numbers import Integral, Real
from operator import index
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Ranges = Mapping[str, tuple[float, float]]
"""The least and the most of a number, or of each number of several, by the field's name."""
LAYERS = (-256, 256)
"""Numbers of layers that a tower or a language model may have, from either end."""
PROVENANCE_RANGES: Ranges = {
    **{"feature_dim": (1, 2**20), "layer": LAYERS, "grid_hw": (1, 2**14), "num_slots": (1, 2**20)}
}
"""Of what a trained network was made for."""
_T = TypeVar("_T")
_MOST_VALUES = 100_000
_DEEPEST = 64
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: Any) -> str:
    """`repr`, of what is long or nested no more than its beginning: for messages."""
    return _SHORT.repr(value)


def plain(value: Any) -> Any:
    """The number in an array or a tensor of no dimension, numpy's scalars among them.

    Everything else is as it was.
    """
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else value


def whole_number(value: Any) -> int | None:
    """What Python would count by (`operator.index`), as a plain int; None for all else.

    Truth values are none, and neither are arrays of one number.
    """
    value = plain(value)
    if isinstance(value, bool) or hasattr(value, "ndim"):
        return None
    try:
        return index(value)
    except TypeError:
        return None


def real_number(value: Any) -> float | None:
    """A number as a plain float; None for all else: truth values, arrays, numbers beyond floats."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def share_number(value: Any) -> float | None:
    """A part of a whole, above 0 and up to 1, as a plain float; None for all else."""
    number = real_number(value)
    return number if number is not None and 0 < number <= 1 else None


def count_or_share(value: Any) -> int | float | None:
    """A whole number above 0, or else a `share_number`, in plain numbers; None for all else."""
    count = whole_number(value)
    if count is None:
        return share_number(value)
    return count if count > 0 else None


def no_such(name: str, known: Iterable[str], most: int = 1, otherwise: str = ".") -> str:
    """How a sentence about an unknown name ends: `; did you mean 'x'?`, or a full stop.

    Args:
        name: that is unknown. known: the others.
        most: of these that are named, the closest. otherwise: the end where none is close.
    """
    close = get_close_matches(name, known, n=most)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else otherwise


def read_fields(cls: type[_T], values: Mapping[str, Any]) -> _T:
    """A dataclass of plain values, as `asdict` or JSON hold them: lists become tuples.

    Args:
        cls: the dataclass; fields that are dataclasses are read so too.
        values: by the names of its fields.

    Raises:
        ValueError: for unknown names, and values of another type, out of their range or not finite.
        TypeError: if one without a default is missing.
    """
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    if unknown := sorted(map(str, values.keys() - known.keys())):
        hint = no_such(unknown[0], known)
        raise ValueError(f"unknown settings {shown(unknown)}{hint} Known are {sorted(known)}.")
    return cls(**of_fields(cls, values))


def of_fields(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the fields of a class have them; of names that are none every value is.

    Raises:
        ValueError: for values of another type, out of their range or not finite.
    """
    kinds, ranges = hints(cls), _ranges(cls)
    return {n: checked(n, v, kinds.get(n, Any), ranges.get(n)) for n, v in values.items()}


def hints(cls: type[Any]) -> dict[str, Any]:
    """The annotations of a class; none of a plug-in's that cannot be looked up here."""
    try:
        return get_type_hints(cls)
    except (NameError, AttributeError, TypeError):
        return {}


def _ranges(cls: type[Any]) -> dict[str, tuple[float, float]]:
    """Of a class and of those that it is derived from."""
    found: dict[str, tuple[float, float]] = {}
    for base in reversed(cls.__mro__):
        found |= vars(base).get("ranges", {})
    return found


def checked(name: str, value: Any, kind: Any, limits: tuple[float, float] | None = None) -> Any:
    """A plain value as an annotation has it.

    Args:
        name: what messages call it.
        value: of JSON, YAML or `asdict`.
        kind: the annotation; of one that is no plain type every value is.
        limits: the least and the most of each number.

    Raises:
        ValueError: if it is of another type, out of the limits or not finite.
    """
    try:
        return _as(name, value, kind, limits)
    except _Other:
        raise ValueError(f"{name}={shown(value)}; pass {_told(kind, limits)}.") from None


class _Other(Exception):
    """A value is of another type, or out of its limits."""


def _as(name: str, value: Any, kind: Any, limits: tuple[float, float] | None) -> Any:
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for option in options:
            try:
                return _as(name, value, option, limits)
            except _Other:
                continue
        raise _Other
    if origin is Literal:
        return _when(any(value == o and type(value) is type(o) for o in options), value)
    if kind in (NoneType, bool, str):
        return _when(isinstance(value, kind), value)
    if kind is int:
        return _number(value, Integral, limits)
    if kind is float:
        return _number(value, Real, limits)
    if origin is tuple or origin in (list, Sequence):
        return _several(name, value, origin, options, limits)
    if kind is dict or origin in (dict, Mapping):
        _when(isinstance(value, Mapping), value)
        refuse_large(name, value)
        return dict(value)
    if is_dataclass(kind) and isinstance(kind, type) and not isinstance(value, kind):
        _when(isinstance(value, Mapping), value)
        return read_fields(kind, value)
    return value


def _number(value: Any, kind: type, limits: tuple[float, float] | None) -> Any:
    _when(isinstance(value, kind) and not isinstance(value, bool), value)
    try:
        finite = isfinite(value)
    except OverflowError:  # a whole number beyond every float
        finite = True
    least, most = limits or (float("-inf"), float("inf"))
    return _when(finite and least <= value <= most, value)


def _several(
    name: str, value: Any, origin: Any, options: tuple[Any, ...], limits: Any
) -> list[Any] | tuple[Any, ...]:
    _when(isinstance(value, list | tuple) and len(value) <= _MOST_VALUES, value)
    if origin is not tuple or options[1:] == (...,):
        options = (options[0],) * len(value)
    _when(len(options) == len(value), value)
    read = (_as(name, v, kind, limits) for v, kind in zip(value, options, strict=True))
    return tuple(read) if origin is tuple else list(read)


def _when(fits: bool, value: Any) -> Any:
    if not fits:
        raise _Other
    return value


def refuse_large(name: str, value: Any) -> None:
    """Refuse a nest of plain values that is too large to be one of settings.

    One list can be in a file once and in its values a million times.

    Args:
        name: what messages call it.
        value: of mappings, lists and what is neither.

    Raises:
        ValueError: beyond 100,000 values, a depth of 64, or with a number that is not finite.
    """
    waiting, seen = [(value, 1)], 0
    while waiting:
        found, depth = waiting.pop()
        if isinstance(found, float) and not isfinite(found):
            raise ValueError(f"{name} holds {found}; pass numbers that are finite.")
        if isinstance(found, Mapping):
            found = found.values()
        elif not isinstance(found, list | tuple):
            continue
        seen += len(found)
        if seen > _MOST_VALUES or depth > _DEEPEST:
            raise ValueError(
                f"{name} holds more than {_MOST_VALUES} values, or more than {_DEEPEST} in each"
                " other; pass plain settings."
            )
        waiting += [(inner, depth + 1) for inner in found]


def _told(kind: Any, limits: tuple[float, float] | None) -> str:
    """What may be passed."""
    origin, options = get_origin(kind), get_args(kind)
    within = "" if limits is None else f", at least {limits[0]} and at most {limits[1]}"
    if origin in (Union, UnionType):
        return " or ".join(_told(option, limits) for option in options)
    if origin is Literal:
        return f"one of {', '.join(map(str, options))}"
    if kind is NoneType:
        return "null"
    if origin is tuple and options[1:] != (...,):
        return f"a list of {len(options)}: each {_told(options[0], limits)}"
    if origin is tuple or origin in (list, Sequence):
        return f"a list: each {_told(options[0], limits)}"
    if kind is dict or origin in (dict, Mapping) or is_dataclass(kind):
        return "a mapping"
    return _KINDS[kind] + (within if kind in (int, float) else "")
