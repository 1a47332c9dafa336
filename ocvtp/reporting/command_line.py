"""Commands as a user types them: they run as they stand when printed; messages are in their words.

The library speaks of arguments (`num_keep=64`), a command line of flags (`--num-keep 64`) and of
settings of a pruner (`NAME:stages=[[2,64]]`). While a command runs, `as_typed` says the second for
the first.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

_before: list[str] = []
"""Of the command that this process is."""
_flags: dict[str, str] = {}
"""Of the command that runs, by the names of arguments."""
_words: list[str] = []
"""That it was given."""

_ALONE = r"(?<![\w./\\:,'\"`=?&-])"  # no part of a path, an address, a spec, a flag or code
_ASIDE = r"`[^`]*`|(?<!\w)'[^']*'(?!\w)|(?<!\w)\"[^\"]*\"(?!\w)|\b\w+\([^()]*\)"
"""What a message quotes, and calls of Python: that is said as it stands there."""
_TUPLE = r"\((?:[^()]|\([^()]*\))*\)"
_LIST = r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]"
_VALUE = rf"'[^']*'|\"[^\"]*\"|{_TUPLE}|{_LIST}|(?:[^\s,;:)('\"\[\]]*[^\s,;:)('\"\[\].])?"
_SETTING = (
    rf"(?P<pass>\b[Pp]ass (?:e\.g\. )?)?{_ALONE}(?P<name>[a-z]\w*)=(?P<value>{_VALUE})"
    r"(?![\w(\['\"])"
)
_FILE_NAME = re.compile(r"(?!['\"(\[]).*\.(?!\d*(?:e-?\d+)?$)")
"""No value: messages quote texts, and what has a dot without quotes and is no number is a file."""
_NAME = rf"{_ALONE}(?P<name>[a-z]+(?:_[a-z0-9]+)+)(?![\w/\\'\"`=(-]|[.:]\w)"


@contextmanager
def typed_before(words: Sequence[str]) -> Iterator[None]:
    """What was typed between `ocvtp` and the command, e.g. `--import FILE`, holds in the block."""
    outside = list(_before)
    _before[:] = words
    try:
        yield
    finally:
        _before[:] = outside


def command(*words: str) -> str:
    """`ocvtp` with these words, quoted for a shell, and with those of `typed_before`."""
    return shlex.join(["ocvtp", *_before, *words])


@contextmanager
def in_flags(names: Iterable[str], words: Sequence[str]) -> Iterator[None]:
    """A command runs in the block: `as_typed` knows its flags, and errors are told in them.

    Args:
        names: of the arguments that are flags, e.g. `num_keep`. words: of the command line.
    """
    outside = dict(_flags), list(_words)
    _flags.clear()
    _flags.update({name: "--" + name.replace("_", "-") for name in names})
    _words[:] = words
    try:
        yield
    except ValueError as error:
        if (told := as_typed(str(error))) == str(error):
            raise
        raise ValueError(told) from error
    finally:
        _flags.clear()
        _flags.update(outside[0])
        _words[:] = outside[1]


def as_typed(text: str) -> str:
    """A message in the words of the command that runs; as it is where none does."""
    if not _flags:
        return text
    phrases = sorted((word for word in _words if re.search(r"\s", word)), key=len, reverse=True)
    aside = "|".join([*map(re.escape, phrases), _ASIDE])
    text = re.sub(f"{aside}|{_SETTING}", _typed, text)
    return re.sub(f"{aside}|{_NAME}", _named, text)


def _named(found: re.Match[str]) -> str:
    """The name of an argument as a flag."""
    return _flags.get(found["name"], found[0])


def _typed(found: re.Match[str]) -> str:
    """`name=value` as a flag, or else as a setting of a pruner."""
    before, name, value = found["pass"] or "", found["name"], found["value"]
    if name is None or _FILE_NAME.match(value):
        return found[0]
    in_a_spec = f"{name}={value.strip(_QUOTES)}"
    if name in _flags and not any(value and in_a_spec in word for word in _words):
        return before + _flag(_flags[name], value)
    if value.startswith(("(", "[[")) or value in ("True", "False") or (before and value):
        return f"{before}{'NAME:' if before else ''}{name}={_yaml(value)}"
    return f"{before}{name}={value}"


def _flag(flag: str, value: str) -> str:
    if value in ("None", "False"):
        return f"no {flag}"
    if value in ("", "True"):
        return flag
    if value[0] in "([":
        return " ".join(
            [flag, *filter(None, re.split(r"[,\s]+", re.sub(r"[()\[\]'\"]", "", value)))]
        )
    return f"{flag} {shlex.quote(value[1:-1]) if value[0] in _QUOTES else value}"


_QUOTES = "'\""
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}


def _yaml(value: str) -> str:
    """A value of Python as a spec has it: `((1, 16),)` is `[[1,16]]`."""
    if value[0] in _QUOTES:
        return value[1:-1]
    if value[0] in "([":
        value = re.sub(r",?\s*\)", "]", value.replace("(", "["))
        return re.sub(r",\s+", ",", value)
    return _CONSTANTS.get(value, value)
