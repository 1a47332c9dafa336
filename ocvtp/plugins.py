"""What others bring: installed packages, by entry points, and files named on a command line.

A package names in its pyproject.toml the module that registers, say, its pruners when imported:

    [project.entry-points."ocvtp.pruners"]
    mine = "my_package.my_pruner"
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from functools import cache
from pathlib import Path


@cache
def load_installed(group: str) -> None:
    """Import what installed packages name, once.

    Args:
        group: of entry points, e.g. `ocvtp.pruners`.

    Raises:
        ValueError: if one cannot be imported.
    """
    from importlib.metadata import entry_points  # which takes as long as all the rest

    for point in entry_points(group=group):
        try:
            point.load()
        except Exception as error:
            raise ValueError(
                f"{point.value!r} cannot be loaded ({error}); mend or uninstall the package that"
                f" names it as an entry point of {group}."
            ) from error


def import_file(path: str) -> None:
    """Import a Python file that registers something, under its own name.

    Raises:
        ValueError: if there is no such file, another module has its name, or it fails.
    """
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(
            f"{path!r} is no Python file; pass one that registers pruners, tasks or hosts."
        )
    known = sys.modules.get(file.stem)
    if known is not None:
        if getattr(known, "__file__", None) == str(file):
            return
        raise ValueError(f"a module {file.stem!r} is loaded already; give {path} another name.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[file.stem]
        if not isinstance(error, Exception | SystemExit):  # Ctrl-C
            raise
        raise ValueError(
            f"{path}{_line(error, file)} fails with {type(error).__name__}:"
            f" {' '.join(str(error).split())}; mend it."
        ) from error


def _line(error: BaseException, file: Path) -> str:
    """`:12`, where in the file an error came up last."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f":{error.lineno}"
    lines = [
        at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(file)
    ]
    return f":{lines[-1]}" if lines else ""
