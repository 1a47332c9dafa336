"""The flags of commands that ask a task, from its signature, and the task of what was given.

As `flags`, it imports nothing that takes long: a task of this package is told by its file alone.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, get_args, get_origin

from ocvtp.evaluation.tasks.registry import checked, known_signatures, task_class, task_signature
from ocvtp.evaluation.tasks.signatures import REQUIRED, Setting, Signature

if TYPE_CHECKING:
    from ocvtp.evaluation.tasks.base import Supplied, Task

_PREFIX = "task: "  # of settings among the arguments, so that none is taken for another flag
_PLAIN = (str, int, float, Path)
_SEVERAL = (list, tuple, Sequence, Collection, Iterable)


def add_task(parser: argparse.ArgumentParser, words: Sequence[str], lmms: bool = False) -> None:
    """`--task`, and the flags of the task that the words name.

    Where they name none, e.g. before `--help`, the flags are those of all that are known.

    Args:
        parser: has all other flags.
        words: that it will parse.
        lmms: whether lmms-eval is to ask.

    Raises:
        ValueError: if there is no such task, or a setting of it cannot be a flag.
    """
    known = [task for task in known_signatures() if task.lmms or not lmms]
    names, name = ", ".join(task.name for task in known), _named(words)
    parser.add_argument(
        "--task",
        required=True,
        help=f"what is asked: {names}, or one of your own; --task TASK --help shows its flags",
    )
    if name is None:
        _add_all(parser, known)
        return
    task = task_signature(name)
    if lmms and not task.lmms:
        raise ValueError(f"task {name!r} is none that lmms-eval can ask; pass one of {names}.")
    group = parser.add_argument_group(name, task.summary or None)
    for setting in task.settings:
        _add(group, task.name, setting, _help(setting))
    _add_refused(parser, task, known)


def task_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags of the task were given.

    Raises:
        ValueError: if one is missing that the task needs.
    """
    found = {}
    for setting in task_signature(arguments.task).settings:
        if hasattr(arguments, _PREFIX + setting.name):
            value = getattr(arguments, _PREFIX + setting.name)
            is_tuple = any(get_origin(kind) is tuple for kind in _options(setting.kind))
            found[setting.name] = tuple(value) if is_tuple else value
        elif setting.default is REQUIRED:
            what = setting.help or "it"
            raise ValueError(f"--task {arguments.task} needs {_flag(setting)}; pass {what}.")
    return found


def names_of_settings(task: str) -> list[str]:
    """What the flags of a task are called in its signature."""
    return [setting.name for setting in task_signature(task).settings]


def make_task(supplied: Supplied, settings: dict[str, Any]) -> Task:
    """The task, as its class makes it of what the flags were given."""
    return checked(task_class(supplied.task).from_command(supplied, **settings))


def _named(words: Sequence[str]) -> str | None:
    """The value of --task among the words."""
    look = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    look.add_argument("--task")
    try:
        name: str | None = look.parse_known_args(words)[0].task
    except argparse.ArgumentError:  # it has no value, which the whole parser says
        return None
    return name


def _add_all(parser: argparse.ArgumentParser, tasks: Iterable[Signature]) -> None:
    """A group for the settings of every set of tasks that share them."""
    by_name: dict[str, list[tuple[str, Setting]]] = {}
    for task in tasks:
        for setting in task.settings:
            by_name.setdefault(setting.name, []).append((task.name, setting))
    groups: dict[str, Any] = {}
    for takers in by_name.values():
        title = ", ".join(name for name, _ in takers)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], takers[0][0], takers[0][1], _helps(takers))


def _helps(takers: Sequence[tuple[str, Setting]]) -> str:
    """What the tasks say of one flag."""
    said: dict[str, list[str]] = {}
    for name, setting in takers:
        said.setdefault(_help(setting), []).append(name)
    if len(said) == 1:
        return next(iter(said))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in said.items())


def _help(setting: Setting) -> str:
    default = setting.default
    if default is REQUIRED:
        return f"{setting.help} (needed)".strip()
    if isinstance(default, list | tuple) and default:
        default = " ".join(map(str, default))
    if not isinstance(default, _PLAIN) or default in ("", False):
        return setting.help
    return f"{setting.help} (default: {default})".strip()


def _add(group: Any, task: str, setting: Setting, text: str) -> None:
    try:
        group.add_argument(
            _flag(setting),
            dest=_PREFIX + setting.name,
            default=argparse.SUPPRESS,  # the task has its own
            help=text.replace("%", "%%"),
            **_form(task, setting),
        )
    except argparse.ArgumentError as error:
        raise ValueError(
            f"task {task!r} has a setting {setting.name!r}, but the command has the flag"
            f" {_flag(setting)} already; give the setting another name."
        ) from error


def _form(task: str, setting: Setting) -> dict[str, Any]:
    """How `argparse` reads a setting.

    Raises:
        ValueError: if no flag can have its kind.
    """
    kinds = _options(setting.kind)
    count: int | str | None = None
    several = [kind for kind in kinds if get_origin(kind) in _SEVERAL]
    if several:
        inner = [kind for kind in get_args(several[0]) if kind is not Ellipsis]
        fixed = get_origin(several[0]) is tuple and Ellipsis not in get_args(several[0])
        kinds, count = {kind for one in inner for kind in _options(one)}, "+"
        if fixed:
            count = len(inner)
    more = {} if count is None else {"nargs": count}
    if kinds == {bool} and count is None:
        return {"action": argparse.BooleanOptionalAction}
    for kind, narrower in ((Path, {str}), (float, {int}), (int, set()), (str, set())):
        if kind in kinds and kinds <= {kind, *narrower}:
            return {"type": kind, "metavar": setting.name.upper(), **more}
    if len(kinds) == 1 and get_origin(literal := kinds.pop()) is Literal:
        choices = get_args(literal)
        if len(set(map(type, choices))) == 1:
            return {"choices": choices, "type": type(choices[0]), **more}
    written = "nothing" if setting.kind is None else inspect.formatannotation(setting.kind)
    raise ValueError(
        f"task {task!r} has a setting {setting.name}: {written}, which cannot be a"
        " flag; annotate it str, int, float, bool, Path, Literal[...], a Sequence of these, or any"
        " of them | None, or leave it out of a from_command of the task's own."
    )


def _options(kind: Any) -> set[Any]:
    """The kinds that an annotation allows, but None."""
    union = get_origin(kind) in (Union, UnionType)
    return {*(get_args(kind) if union else (kind,))} - {NoneType}


def _flag(setting: Setting) -> str:
    return "--" + setting.name.replace("_", "-")


def _add_refused(
    parser: argparse.ArgumentParser, task: Signature, others: Iterable[Signature]
) -> None:
    """The flags that other tasks have, to say whose they are where they are given."""
    own = {setting.name for setting in task.settings}
    takers: dict[str, list[str]] = {}
    for other in others:
        for setting in other.settings:
            if setting.name not in own:
                takers.setdefault(_flag(setting), []).append(other.name)
    takes = ", ".join(map(_flag, task.settings)) or "none"
    for flag, names in takers.items():
        if flag not in parser._option_string_actions:
            parser.add_argument(
                flag,
                nargs="*",
                action=_Refused,
                help=argparse.SUPPRESS,
                const=f"--task {task.name} has no flag {flag}, which is one of {', '.join(names)};"
                f" leave it out. It takes {takes}.",
            )


class _Refused(argparse.Action):
    """A flag that says why it is none; its `const` is the text."""

    def __call__(self, *_: Any) -> NoReturn:
        raise ValueError(self.const)
