"""Pruners of installed packages and of files."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ocvtp.cli import main
from ocvtp.pruners import plugins

PRUNER = '''
from dataclasses import dataclass
from ocvtp.pruners.registry import register
from ocvtp.pruners.uniform import Uniform

@register("mine")
@dataclass(kw_only=True, eq=False)
class Mine(Uniform):
    """Mine: a pruner of mine.

    Paper: none.
    Stage: llm_input.  Needs: -.  Deterministic: yes.
    """
'''


def run(*words):
    code = "import sys; from ocvtp.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def test_a_file_given_to_the_command_line(tmp_path):
    (tmp_path / "my_pruner.py").write_text(PRUNER)
    listed = run("--import", str(tmp_path / "my_pruner.py"), "list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert '"mine"' in listed.stdout
    assert '"mine"' not in run("list", "--json").stdout


def test_an_installed_package(tmp_path):
    (tmp_path / "my_package.py").write_text(PRUNER)
    facts = tmp_path / "my_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nmine = my_package\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ocvtp;"
        "print(ocvtp.build_pruner('mine', num_keep=2).name, 'mine' in ocvtp.list_pruners())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["mine", "True"], found.stderr
    (tmp_path / "my_package.py").write_text("raise RuntimeError('broken')")
    broken = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'my_package' cannot be loaded (broken)" in broken.stderr


def test_files_that_cannot_be_imported_are_refused(tmp_path, capsys):
    assert main(["--import", str(tmp_path / "nothing.py"), "list"]) == 2
    assert "is no Python file" in capsys.readouterr().err
    (tmp_path / "json.py").write_text(PRUNER)
    with pytest.raises(ValueError, match="a module 'json' is loaded already"):
        plugins.import_file(str(tmp_path / "json.py"))
    broken = tmp_path / "broken_pruner.py"
    broken.write_text("raise KeyError('x')")
    with pytest.raises(KeyError):
        plugins.import_file(str(broken))
    assert "broken_pruner" not in sys.modules
