"""Numbers that change over a training: of temperatures, floors, weights.

A file of settings says `3.0`, or `{linear: [from, to]}` with the way between both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

Way = Literal["constant", "linear", "cosine", "geometric"]
WAYS: tuple[Way, ...] = get_args(Way)
ScheduleValue = float | dict[str, Any]
"""What `parse_schedule` reads."""

_FORMS = "a number, {constant: number}, or {linear | cosine | geometric: [from, to]}"


@dataclass(frozen=True)
class Schedule:
    """A number over a training.

    Args:
        way: `linear`: as a straight line; `cosine`: half a period, slow at both ends; `geometric`:
            by the same factor in each step; `constant`.
        start: at the first step.
        end: at the last.
    """

    way: Way
    start: float
    end: float

    def at(self, share: float) -> float:
        """Its value when a share of all steps is done: 0..1, beyond these its ends.

        `start` and `end` themselves are met exactly.
        """
        x = min(max(float(share), 0.0), 1.0)
        if self.way == "geometric":
            return float(self.start ** (1 - x) * self.end**x)
        if self.way == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return (1 - x) * self.start + x * self.end

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 all the time."""
        return self.start == 0 and self.end == 0

    def plain(self) -> ScheduleValue:
        """What `parse_schedule` makes the same of; goes into JSON and YAML."""
        return self.start if self.way == "constant" else {self.way: [self.start, self.end]}


def parse_schedule(
    value: Any,
    name: str = "schedule",
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Schedule:
    """A schedule as settings write it.

    Args:
        value: a number; `{"constant": x}`; `{"linear": [from, to]}`, and so with `cosine` and
            `geometric`; or a `Schedule`.
        name: what messages call it.
        above: all its values must be above this one.
        least, most: all its values must lie between these, or be one of them.

    Raises:
        ValueError: for anything else, and for values out of range.
    """
    way, ends = _ends(value, name)
    start, end = (
        number(end, name, above=above, least=least, most=most, given=value) for end in ends
    )
    if way == "geometric" and min(start, end) <= 0:
        raise ValueError(
            f"{name}={value!r}; a geometric schedule goes between numbers above 0: pass those, or"
            " linear in its place."
        )
    return Schedule(way, start, end)


def number(
    value: Any,
    name: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    given: Any = None,
) -> float:
    """A finite number.

    Args:
        value: what is checked.
        name: what messages call it. given: what they say was given, `value` itself by default.
        above: it must be above this one.
        least, most: it must lie between these, or be one of them.

    Raises:
        ValueError: for what is none, or is out of range.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not is_number
        or (above is not None and not value > above)
        or (least is not None and not value >= least)
        or (most is not None and not value <= most)
    ):
        bounds = ((above, "above"), (least, "of at least"), (most, "of at most"))
        bound = " and".join(f" {words} {b:g}" for b, words in bounds if b is not None)
        what = "numbers" if isinstance(given, Mapping | Schedule) else "a number"
        raise ValueError(f"{name}={value if given is None else given!r}; pass {what}{bound}.")
    return float(value)


def _ends(value: Any, name: str) -> tuple[Way, tuple[Any, Any]]:
    """The way between two ends, and what these are said to be."""
    if isinstance(value, Schedule):
        return value.way, (value.start, value.end)
    if not isinstance(value, Mapping):
        if value is None or isinstance(value, str | list | tuple):
            raise ValueError(f"{name}={value!r}; pass {_FORMS}.")
        return "constant", (value, value)
    if len(value) != 1 or (way := next(iter(value))) not in WAYS:
        raise ValueError(f"{name}={dict(value)!r}; pass {_FORMS}.")
    ends = value[way]
    if way == "constant":
        return way, (ends, ends)
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise ValueError(f"{name}={dict(value)!r}; pass two numbers, {{{way}: [from, to]}}.")
    return way, (ends[0], ends[1])
