"""YAML of others: read only where it is no larger than it looks.

A few lines in which each names the one before ten times stand for any number of values, and a few
thousand brackets for as many calls within each other. Both are seen in the stream of events, before
anything is made of it.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any

import yaml

from ocvtp.field_types import shown

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MOST_VALUES = 100_000
_DEEPEST = 64
_TOO_DEEP = f"it nests deeper than {_DEEPEST}; take brackets out"
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}
_POWER_OF_TEN = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


class _Values(_LOADER):  # type: ignore[misc, valid-type]
    """YAML, whose version 1.1 takes `1e-4` for a text, as it has no dot."""


_Values.add_implicit_resolver("tag:yaml.org,2002:float", _POWER_OF_TEN, [*"-+.0123456789"])


def read_value(text: str) -> Any:
    """The value of a setting: numbers, words, lists, mappings.

    Raises:
        ValueError: if it is none, or `refuse_bomb` refuses it.
    """
    refuse_bomb(text)
    try:
        return yaml.load(text, Loader=_Values)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{shown(text)} is no value") from error


def refuse_bomb(text: str) -> None:
    """Refuse YAML that stands for more than 100,000 values, or nests deeper than 64.

    What is no YAML is left to whoever reads it.

    Raises:
        ValueError: says which of the two it is.
    """
    opened = accumulate(_STEPS[bracket] for bracket in re.findall(r"[][{}]", text))
    if max(opened, default=0) > _DEEPEST:  # scanning them takes seconds
        raise ValueError(_TOO_DEEP)
    sizes: dict[str | None, int] = {}
    counts, anchors = [0], list[str | None]()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.events.AliasEvent):
                holds_itself = event.anchor in anchors
                counts[-1] += _MOST_VALUES if holds_itself else sizes.get(event.anchor, 1)
            elif isinstance(event, yaml.events.CollectionStartEvent):
                counts.append(1)
                anchors.append(event.anchor)
            elif isinstance(event, yaml.events.CollectionEndEvent):
                size, anchor = counts.pop(), anchors.pop()
                counts[-1] += size
                if anchor is not None:
                    sizes[anchor] = size
            elif isinstance(event, yaml.events.ScalarEvent):
                counts[-1] += 1
                if event.anchor is not None:
                    sizes[event.anchor] = 1
            if counts[-1] >= _MOST_VALUES:
                raise ValueError(
                    f"it stands for more than {_MOST_VALUES} values; write out what anchors (&) and"
                    " aliases (*) repeat"
                )
            if len(counts) > _DEEPEST:
                raise ValueError(_TOO_DEEP)
    except (yaml.YAMLError, RecursionError):
        return
