"""What a task is told, as its signature says it: the flags of a command line.

The tasks of this package are known before anything that takes long is imported: their signatures
are read from their files, of which nothing is run but the imports of a few light modules.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from ocvtp.evaluation.tasks.base import Task

REQUIRED = inspect.Parameter.empty
"""The default of a setting that has none."""
_MAKER = "from_command"
_LIGHT = {"collections.abc", "ocvtp.choices", "pathlib", "typing"}


@dataclass(frozen=True)
class Setting:
    """One parameter of a task.

    Args:
        name: as in the signature, e.g. `num_images`.
        kind: its annotation, e.g. `int | None`.
        default: REQUIRED where it has none.
        help: the text that is annotated: `Annotated[int, "of each level"]`.
    """

    name: str
    kind: Any
    default: Any
    help: str


@dataclass(frozen=True)
class Signature:
    """What is known of a task without making it.

    Args:
        name: in the registry.
        summary: the first line of its docstring.
        lmms: see `Task.lmms`.
        settings: the parameters of `from_command`; where a task has none of its own, those of the
            constructor.
    """

    name: str
    summary: str
    lmms: str | None
    settings: tuple[Setting, ...]


def of_class(cls: type[Task]) -> Signature:
    """The signature of a task.

    Raises:
        ValueError: if annotations cannot be looked up, or a parameter stands for several.
    """
    from ocvtp.evaluation.tasks.base import Task  # loaded already: the class is one

    maker: Any = cls.from_command
    plain: Any = Task.from_command
    if maker.__func__ is plain.__func__:  # which passes everything on
        maker, parameters = cls.__init__, [*inspect.signature(cls).parameters.values()]
    else:
        maker, parameters = maker.__func__, [*inspect.signature(maker).parameters.values()][1:]
    names = {parameter.name for parameter in parameters}
    given = {k: v for k, v in inspect.get_annotations(maker).items() if k in names}
    try:
        hints = _looked_up(given, getattr(maker, "__globals__", {}))
    except (NameError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the annotations of task {cls.name!r} cannot be looked up ({error}); import what they"
            " name at the top of its file."
        ) from error
    settings = tuple(_settings(cls.name, parameters, hints))
    return Signature(cls.name, _first_line(vars(cls).get("__doc__")), cls.lmms, settings)


def of_file(name: str) -> Signature:
    """The signature of a task of this package, read from the file of that name."""
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and _registers(node))
    functions = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
    maker = functions.get(_MAKER) or functions["__init__"]
    maker.decorator_list, maker.body = [], [ast.Pass()]
    imports = [
        node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module in _LIGHT
    ]
    lines = ["from __future__ import annotations", *map(ast.unparse, [*imports, maker])]
    space: dict[str, Any] = {}
    exec("\n".join(lines), space)
    left_out = 2 if maker.name == _MAKER else 1  # cls and supplied, or self
    parameters = list(inspect.signature(space[maker.name]).parameters.values())[left_out:]
    hints = _looked_up({p.name: p.annotation for p in parameters}, space)
    settings = tuple(_settings(name, parameters, hints))
    return Signature(name, _first_line(ast.get_docstring(cls)), _lmms(cls), settings)


def _looked_up(annotations: Mapping[str, Any], space: Mapping[str, Any]) -> dict[str, Any]:
    holder: Any = SimpleNamespace(__annotations__=dict(annotations))
    return get_type_hints(holder, globalns=dict(space), include_extras=True)


def _settings(
    task: str, parameters: Iterable[inspect.Parameter], hints: Mapping[str, Any]
) -> Iterable[Setting]:
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise ValueError(
                f"task {task!r} takes {stars}{parameter.name}, which names no settings; name each"
                f" in the constructor, or in {_MAKER}."
            )
        kind, text = hints.get(parameter.name), ""
        if get_origin(kind) is Annotated:
            kind, *notes = get_args(kind)
            text = next((note for note in notes if isinstance(note, str)), "")
        yield Setting(parameter.name, kind, parameter.default, text)


def _registers(cls: ast.ClassDef) -> bool:
    return any(ast.unparse(line).startswith("register_task(") for line in cls.decorator_list)


def _lmms(cls: ast.ClassDef) -> str | None:
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "lmms":
            assert node.value is not None
            found: str | None = ast.literal_eval(node.value)
            return found
    return None


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
