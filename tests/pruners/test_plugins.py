"""Pruners of installed packages and of files."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

import ocvtp
from ocvtp import plugins
from ocvtp.cli import main
from ocvtp.pruners import registry
from ocvtp.pruners.base import Status
from ocvtp.pruners.catalog import entry
from ocvtp.pruners.methods.fastervlm import FasterVLM
from ocvtp.pruners.methods.uniform import Uniform

PRUNER = '''
from dataclasses import dataclass
from ocvtp.pruners.registry import register
from ocvtp.pruners.methods.uniform import Uniform

@register("mine")
@dataclass(kw_only=True, eq=False)
class Mine(Uniform):
    """Mine: a pruner of mine.

    Paper: none.
    Stage: llm_input.  Needs: -.  Deterministic: yes.
    """
'''


@pytest.fixture
def mine(monkeypatch):
    """No pruner of this name, before and after."""
    assert "mine" not in registry.list_pruners()
    yield "mine"
    registry._REGISTRY.pop("mine", None)
    plugins.load_installed.cache_clear()


def test_a_file_given_to_the_command_line(tmp_path, capsys, mine, monkeypatch):
    path = tmp_path / "my_pruner.py"
    path.write_text(PRUNER)
    monkeypatch.setitem(sys.modules, "my_pruner", None)
    monkeypatch.delitem(sys.modules, "my_pruner")
    assert main(["--import", str(path), "--import", str(path), "list", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["pruners"]}
    assert found["mine"]["status"] == "yours"
    assert found["uniform"]["status"] == "control"


def test_a_method_is_yours_unless_it_says_what_it_is():
    class Bare(ocvtp.Pruner):
        def _select(self, tokens, num_keep):
            raise NotImplementedError

    class OfAnOfficialOne(FasterVLM):
        pass

    @dataclass(kw_only=True, eq=False)
    class OfAControl(Uniform):
        power: float = 1.0

    class Yardstick(Uniform):
        status: ClassVar[Status] = "control"

    for made in (Bare, OfAnOfficialOne, OfAControl):
        assert made.status == made(num_keep=1).status == "yours"
    assert Yardstick(num_keep=1).status == "control"
    assert FasterVLM.status == "official"


def test_a_pruner_without_a_docstring_is_listed(mine):
    @registry.register("mine")
    @dataclass(kw_only=True, eq=False)
    class Mine(FasterVLM):
        pass

    found = entry("mine")
    assert (found.stage, found.needs, found.status) == ("llm_input", "not said", "yours")
    assert found.title == "Mine"


def test_a_pruner_that_has_only_a_docstring_is_listed(mine):
    """As plug-ins were written before facts were attributes."""
    exec(compile(PRUNER, "my_pruner.py", "exec"), {"__name__": "my_pruner"})
    found = entry("mine")
    assert (found.title, found.stage) == ("Mine: a pruner of mine.", "llm_input")
    assert (found.needs, found.status) == ("not said", "yours")
    assert ocvtp.build_pruner("mine", num_keep=2).name == "mine"


def test_facts_are_attributes(mine):
    @registry.register("mine")
    class Mine(FasterVLM):
        """Words for a reader, with a line Stage: nowhere.  Needs: nothing.  Deterministic: no."""

        title: ClassVar[str] = "Mine: two halves."
        reads: ClassVar[str] = "attention (CLS)"

        @property
        def parts(self):
            return ocvtp.build_pruner("vitcop", num_keep=self.num_keep).parts

    found = entry("mine")
    assert (found.title, found.needs) == ("Mine: two halves.", "attention (CLS)")
    assert (found.stage, found.merges) == ("llm_input + llm_layers", True)


def test_a_method_of_parts_that_takes_more_than_a_budget_is_listed(mine):
    @registry.register("mine")
    class Mine(FasterVLM):
        """Mine: it cannot be built from a number."""

        def __init__(self, *, num_keep, network):
            super().__init__(num_keep=num_keep)

        @property
        def parts(self):
            return (self,)

    assert entry("mine").stage == "llm_input"


def test_an_installed_package(tmp_path, mine, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_of_mine.py").write_text(PRUNER)
    facts = tmp_path / "package_of_mine-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: package_of_mine\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{registry.GROUP}]\nmine = package_of_mine\n")
    plugins.load_installed.cache_clear()
    assert mine in ocvtp.list_pruners()
    assert ocvtp.build_pruner(mine, num_keep=2).name == mine

    (facts / "entry_points.txt").write_text(f"[{registry.GROUP}]\nmine = broken_package\n")
    plugins.load_installed.cache_clear()
    with pytest.raises(ValueError, match="'broken_package' cannot be loaded"):
        ocvtp.list_pruners()
    (facts / "entry_points.txt").write_text("")


def test_files_that_cannot_be_imported_are_refused(tmp_path, capsys):
    assert main(["--import", str(tmp_path / "nothing.py"), "list"]) == 2
    assert "is no Python file" in capsys.readouterr().err
    (tmp_path / "json.py").write_text(PRUNER)
    with pytest.raises(ValueError, match="a module 'json' is loaded already"):
        plugins.import_file(str(tmp_path / "json.py"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\nraise KeyError('x')", ":2 fails with KeyError: 'x'; mend it."),
        ("import ocvtp\ndef broken(:\n    pass", ":2 fails with SyntaxError"),
        ("import nothing_of_this_name", ":1 fails with ModuleNotFoundError"),
        ("import json\n\njson.loads('{')", ":3 fails with JSONDecodeError"),
        ("import sys\nsys.exit('bye')", ":2 fails with SystemExit: bye"),
        ("\x00", "broken_pruner.py"),
    ],
)
def test_files_that_fail_are_named_with_the_line(tmp_path, capsys, text, reason):
    broken = tmp_path / "broken_pruner.py"
    broken.write_text(text)
    assert main(["--import", str(broken), "list"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ocvtp: error: {broken}")
    assert reason in line
    assert "broken_pruner" not in sys.modules


def test_a_stop_while_a_file_is_imported_stops(tmp_path, capsys):
    (tmp_path / "slow_pruner.py").write_text("raise KeyboardInterrupt")
    assert main(["--import", str(tmp_path / "slow_pruner.py"), "list"]) == 130
    assert "slow_pruner" not in sys.modules
