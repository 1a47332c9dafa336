"""Modules that plug-ins and scripts of earlier versions import by their names of then."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

HOMES = {
    "ocvtp.evaluation.coverage": "ocvtp.evaluation.tasks.coverage",
    "ocvtp.evaluation.pope": "ocvtp.evaluation.tasks.pope",
    "ocvtp.evaluation.scenes": "ocvtp.evaluation.tasks.scenes",
    "ocvtp.evaluation.vqa": "ocvtp.evaluation.tasks.vqa",
    "ocvtp.files": "ocvtp.reporting.files",
    "ocvtp.hosts.rewrite": "ocvtp.hosts.prompt.shorten",
    "ocvtp.hosts.sharing": "ocvtp.hosts.runtime.shared_encodings",
    "ocvtp.hosts.templates": "ocvtp.hosts.prompt.chat_template",
    "ocvtp.pruners.bipartite": "ocvtp.ops.bipartite",
    "ocvtp.pruners.clustering": "ocvtp.ops.clustering",
    "ocvtp.pruners.colours": "ocvtp.ops.patch_colours",
    "ocvtp.pruners.diversity": "ocvtp.ops.diversity",
    "ocvtp.pruners.halves": "ocvtp.pruners.two_stage",
    "ocvtp.pruners.in_blocks": "ocvtp.pruners.block_merger",
    "ocvtp.pruners.layered": "ocvtp.pruners.layer_pruner",
    "ocvtp.pruners.merging": "ocvtp.ops.merging",
    "ocvtp.pruners.plugins": "ocvtp.plugins",
    "ocvtp.pruners.quotas": "ocvtp.ops.clustering",
    "ocvtp.pruners.selection": "ocvtp.ops.selection",
    "ocvtp.pruners.similarity": "ocvtp.ops.similarity",
    "ocvtp.pruners.text": "ocvtp.ops.prompt_text",
}
_METHODS = Path(__file__).parent / "pruners" / "methods"


def home_of(name: str) -> str | None:
    """Where the module of an earlier name is; None for other names."""
    package, _, last = name.rpartition(".")
    if package == "ocvtp.pruners" and (_METHODS / f"{last}.py").is_file():
        return f"{package}.methods.{last}"
    return HOMES.get(name)


class _Moved(MetaPathFinder, Loader):
    """Finds the module of today under its name of yesterday: one module, two names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if home_of(name) is None else ModuleSpec(name, self)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        home = str(home_of(name))
        warnings.warn(f"{name} is now {home}; import that.", DeprecationWarning, stacklevel=2)
        sys.modules[name] = import_module(home)


def find_moved() -> None:
    """Let Python find them; what is there under a name wins."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
