"""Tasks by name: those of this package, of installed ones, and of files that were imported."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from ocvtp import plugins
from ocvtp.evaluation.tasks import signatures
from ocvtp.field_types import no_such

if TYPE_CHECKING:
    from ocvtp.evaluation.tasks.base import Task

BUILT_IN = ("scenes", "grounding", "turns", "several", "pope", "vqa", "coverage")
"""Those of this package, each in the file of its name beside this one."""
GROUP = "ocvtp.tasks"
"""Of entry points."""
_REGISTRY: dict[str, type[Task]] = {}
_T = TypeVar("_T", bound="type[Task]")


def register_task(name: str) -> Callable[[_T], _T]:
    """Class decorator: make a `Task` known under `name`.

    Args:
        name: of letters, digits, `-` and `_`; results are written to a folder of this name.

    Raises:
        ValueError: if the name is taken or is none, or the class is no task or lacks a method.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"task name {name!r} is none; pass letters, digits, - and _.")

    def add(cls: _T) -> _T:
        from ocvtp.evaluation.tasks.base import Task  # which this file must not wait for

        if not (isinstance(cls, type) and issubclass(cls, Task)):
            raise ValueError(
                f"{cls!r} is no Task; derive it from ocvtp.evaluation.tasks.base.Task."
            )
        if name in _REGISTRY or (name in BUILT_IN and cls.__module__ != _module(name)):
            raise ValueError(f"task {name!r} is registered already; choose another name.")
        if absent := sorted(cls.__abstractmethods__):
            raise ValueError(f"task {name!r} lacks {', '.join(absent)}; define what is missing.")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def list_tasks() -> list[str]:
    """Names of all tasks, sorted."""
    plugins.load_installed(GROUP)
    return sorted({*BUILT_IN, *_REGISTRY})


def task_class(name: str) -> type[Task]:
    """The class registered under `name`.

    Raises:
        ValueError: if there is none; names close ones.
    """
    if name in BUILT_IN:
        import_module(_module(name))
    else:
        plugins.load_installed(GROUP)
    if name not in _REGISTRY:
        known = list_tasks()
        hint = no_such(name, known, 3, ";")
        raise ValueError(f"unknown task {name!r}{hint} Known: {', '.join(known)}.")
    return _REGISTRY[name]


def task_signature(name: str) -> signatures.Signature:
    """What a task is told; one of this package is not imported for it.

    Raises:
        ValueError: as `task_class`; or if its signature cannot be read.
    """
    if name in BUILT_IN and name not in _REGISTRY:
        return signatures.of_file(name)
    return signatures.of_class(task_class(name))


def known_signatures() -> list[signatures.Signature]:
    """Those of this package and of files that were imported; installed packages are left alone.

    A task whose signature cannot be read is left out: `task_signature` says why.
    """
    found = []
    for name in dict.fromkeys((*BUILT_IN, *_REGISTRY)):
        with suppress(ValueError):
            found.append(task_signature(name))
    return found


def build_task(name: str, **settings: Any) -> Task:
    """Make a task, e.g. `build_task("scenes", num_images=10)`.

    Args:
        name: see `list_tasks()`.
        settings: of its constructor.

    Raises:
        ValueError: for unknown names and settings, and if one that is needed is missing.
    """
    cls = task_class(name)
    parameters = inspect.signature(cls).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(known) == len(parameters):
        for setting in settings:
            if setting not in known:
                raise ValueError(
                    f"task {name!r} has no setting {setting!r}{no_such(setting, known)} It takes"
                    f" {', '.join(known)}."
                )
    needed = [p.name for p in parameters if p.default is p.empty and p.name in known]
    if missing := [setting for setting in needed if setting not in settings]:
        raise ValueError(f"task {name!r} needs {', '.join(missing)}; pass them by name.")
    return checked(cls(**settings))


def checked(task: Task) -> Task:
    """The task itself.

    Raises:
        ValueError: if it asks nothing, or says no metrics.
    """
    for name, what in (("items", "what is asked"), ("metrics", "the figures that are shown")):
        if not getattr(task, name, ()):
            raise ValueError(f"task {task.name!r} has no {name}; set self.{name} to {what}.")
    return task


def _module(name: str) -> str:
    return f"{__package__}.{name}"
