"""Dependencies run one way, and some things are nowhere to be found."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache, cached_property
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

ROOT = Path("ocvtp")
FILES = sorted(ROOT.rglob("*.py"))

# From the bottom to the top: a file imports of its own part and of the lines above it.
STOREYS = (
    "lazy moved plugins choices field_types shipped transformers_names structures",
    "images plain_yaml",
    "reporting random_models",
    "ops towers data visualize",
    "encoders learning",
    "slots",
    "surprise",
    "selectors",
    "pruners",
    "hosts",
    "export",
    "training",
    "evaluation",
    "flops",
    "bench serving",
    "recommend explore",
    "commands",
    "cli __init__",
)
# The same inside of ocvtp/hosts.
HOST_STOREYS = (
    "cache_notes lazy_projection wrap_methods",
    "base",
    "in_llm in_tower sight",
    "prompt",
    "asked",
    "asked_column",
    "answering",
    "families",
    "registry",
    "asking origin",
    "gating",
    "loading runtime",
    "attach",
    "__init__",
)


def storeys(lines: tuple[str, ...]) -> dict[str, int]:
    return {part: number for number, parts in enumerate(lines) for part in parts.split()}


STOREY, HOST_STOREY = storeys(STOREYS), storeys(HOST_STOREYS)
LIGHTNING = {"training", "data/module.py", "data/folder.py", "data/features.py", "data/sources.py"}
TRANSFORMERS = {
    "encoders/clip.py", "encoders/qwen.py", "encoders/tiles.py", "hosts", "evaluation", "flops",
    "bench", "transformers_names.py", "random_models", "reporting/environment.py",
}  # fmt: skip
# What differs between the versions of transformers that are supported: one file knows it.
MOVING_NAMES = {
    "past_key_values", "mm_encoder_outputs", "image_outputs", "image_hidden_states",
    "create_causal_mask", "masking_utils", "apply_rotary_pos_emb", "transformers.models",
}  # fmt: skip


def of_every_file(check):
    """One test of all files, as naming each in a test of its own takes longer than the check."""

    def test():
        for path in FILES:
            check(path)

    test.__name__ = check.__name__
    return test


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path) -> set[str]:
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(path: Path, places: set[str]) -> bool:
    name = path.relative_to(ROOT).as_posix()
    return name in places or name.split("/")[0] in places


MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


@cache
def imported(path: Path) -> set[Path]:
    """The files of the package that a file imports, inside of functions too."""
    found = set()
    for name in imports(path):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(MODULES.get(name, path))
    return found - {path}


@of_every_file
def test_imports_go_down(path):
    for target in imported(path):
        if part(target) == "__init__":  # the package's own names, e.g. its version
            continue
        same = part(path) == part(target)
        assert same or STOREY[part(target)] < STOREY[part(path)], f"{path} imports {target}"


@of_every_file
def test_imports_of_hosts_go_down(path):
    if not within(path, {"hosts"}):
        return
    own = path.relative_to(ROOT / "hosts").parts[0].removesuffix(".py")
    for target in imported(path):
        if part(target) != "hosts":
            continue
        other = target.relative_to(ROOT / "hosts").parts[0].removesuffix(".py")
        is_below = HOST_STOREY[other] < HOST_STOREY[own]
        assert other == own or is_below, f"{path} imports {target}"


def test_no_files_import_each_other_in_a_circle():
    order = TopologicalSorter({path: imported(path) for path in FILES})
    order.prepare()


@of_every_file
def test_heavy_libraries_stay_in_their_place(path):
    names = {name.split(".")[0] for name in imports(path)}
    assert "pytorch_lightning" not in names or within(path, LIGHTNING)
    assert "transformers" not in names or within(path, TRANSFORMERS)
    assert "pickle" not in names
    assert "matplotlib.pyplot" not in imports(path)


@of_every_file
def test_sizes_and_forbidden_things(path):
    text = path.read_text()
    assert path.name != "utils.py"
    for word in ("os.environ", "__class__ =", ".forward = "):
        assert word not in text, f"{path}: {word}"
    for node in nodes(path):
        if isinstance(node, ast.Call) and "load_state_dict" in ast.unparse(node.func):
            assert "strict=False" not in ast.unparse(node), f"{path}: {ast.unparse(node)}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            body = length - len((ast.get_docstring(node) or "").splitlines())
            assert body <= 50, f"{path}: {node.name} has {body} lines"


EXTRAS = {"lmms_eval", "vllm"}
OF_VLLM = ("core", "llava", "llava_next", "internvl", "qwen")
OF_EXTRAS = {"ocvtp.evaluation.lmms.model", *(f"ocvtp.serving.vllm_{n}" for n in OF_VLLM)}


def undocumented(module: ModuleType) -> list[str]:
    """Public methods and properties that have no docstring, and override nothing that could."""
    kinds = (FunctionType, property, classmethod, staticmethod, cached_property)
    return [
        f"{cls.__name__}.{name}"
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__
        for name, value in vars(cls).items()
        if isinstance(value, kinds) and not value.__doc__
        if not cls.__name__.startswith("_") and not name.startswith("_")
        if not any(hasattr(base, name) for base in cls.__mro__[1:])
    ]


def test_public_methods_say_what_they_do():
    """Ruff asks it of classes and functions; an override is documented by its base."""
    silent, left_out = {}, set()
    for name in MODULES:
        try:
            silent[name] = undocumented(import_module(name))
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            left_out.add(name)
    assert left_out <= OF_EXTRAS
    assert {name: methods for name, methods in silent.items() if methods} == {}


def test_methods_that_say_nothing_are_found():
    class Base:
        def documented(self):
            """Words."""

        def silent(self): ...

        @property
        def still(self): ...

        def _private(self): ...

    class Derived(Base):
        def documented(self): ...

        def further(self): ...

    module = ModuleType("found")
    for cls in (Base, Derived):
        cls.__module__ = "found"
        setattr(module, cls.__name__, cls)
    assert undocumented(module) == ["Base.silent", "Base.still", "Derived.further"]


@pytest.mark.slow
def test_inference_imports_neither_lightning_nor_transformers():
    code = (
        "import sys; from ocvtp import *;"
        "heavy = {'pytorch_lightning', 'transformers', 'timm', 'matplotlib', 'scipy'};"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_no_method_is_named_in_hosts():
    import ocvtp

    names = set(ocvtp.list_pruners()) - {"none", "random", "uniform", "ocvtp"}
    for path in (ROOT / "hosts").rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names, f"{path} names {node.value}"


def looked_up(path: Path) -> set[str]:
    """Names of attributes, arguments and imports, and words that are used as one."""
    found = {part for name in imports(path) for part in name.split(".")}
    found |= {".".join(name.split(".")[:2]) for name in imports(path)}
    for node in nodes(path):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.keyword | ast.arg):
            found.add(str(node.arg))
    return found


@of_every_file
def test_one_file_knows_what_differs_by_version_of_transformers(path):
    found = MOVING_NAMES & looked_up(path)
    assert not found or path.name == "transformers_names.py", f"{path} looks up {sorted(found)}"


def test_names_that_differ_by_version_are_found(tmp_path):
    spellings = {
        "keyword.py": "f(past_key_values=1)",
        "attribute.py": "output.image_outputs",
        "string.py": "kwargs.get('mm_encoder_outputs')",
        "argument.py": "def f(past_key_values): ...",
        "imported.py": "from transformers.masking_utils import create_causal_mask",
        "family.py": "from transformers.models.llava import modeling_llava",
    }
    for name, code in spellings.items():
        (tmp_path / name).write_text(code)
        assert MOVING_NAMES & looked_up(tmp_path / name), name


def test_there_is_one_context_variable():
    made = [path for path in FILES if "ContextVar(" in path.read_text()]
    assert made == [ROOT / "towers" / "recordings.py"]


# Who may leave something on objects of others, which it owns.
OWNERS = {"cache_notes.py", "attachment.py", "wrap_methods.py"}


@of_every_file
def test_nothing_else_is_hidden_on_models_and_caches(path):
    if within(path, {"hosts"}):
        assert "_ocvtp_" not in path.read_text() or path.name in OWNERS, path


BUILDERS = ("build_pruner", "build_spec", "pruner_class", "of_name")
LEARNED = {"OCPruner", "OCPrunerConfig", "OCVTP"}
OF_LEARNED = {
    "slots", "pruners/methods/ocvtp.py", "export/official.py", "__init__.py",
    "selectors/scorers/slots.py",
    "pruners/methods/ridge.py",  # takes the statistics that an OC-pruner holds
}  # fmt: skip


@of_every_file
def test_no_trainable_pruner_is_named_outside_of_its_own_files(path):
    if within(path, OF_LEARNED):
        return
    known = looked_up(path) | {node.id for node in nodes(path) if isinstance(node, ast.Name)}
    assert not LEARNED & known, f"{path} names {LEARNED & known}: ask ocvtp.pruners.trainable"
    for node in nodes(path):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(BUILDERS):
            named = {value.value for value in node.args if isinstance(value, ast.Constant)}
            assert "ocvtp" not in named, f"{path}: {ast.unparse(node)}"
