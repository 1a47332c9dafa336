"""The README and CONTRIBUTING say what is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import ocvtp
from ocvtp.pruners.catalog import markdown_table
from ocvtp.structures import VisualTokens

README = Path("README.md").read_text()


def generated(name: str) -> str:
    found = re.search(rf"<!-- {name}: .*?-->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found, f"README lacks the section {name}"
    return found[1]


def test_the_table_of_pruners_is_the_registry():
    assert generated("pruners") == markdown_table()


def test_the_measured_tables_are_the_result_files():
    from benchmarks.accuracy import accuracy_table
    from benchmarks.table import hosts_tables, select_table, stages_table, table

    assert generated("measured") == table()
    assert generated("hosts") == hosts_tables()
    assert generated("stages") == stages_table()
    assert generated("select") == select_table()
    assert generated("accuracy") == accuracy_table()


def test_its_make_targets_and_files_exist():
    makefile = Path("Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README + Path("CONTRIBUTING.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"configs/train/\w+\.yaml", README) + re.findall(
        r"\]\((\w[^):]+)\)", README
    ):
        assert Path(path).exists(), path


def test_its_commands_exist(capsys):
    from ocvtp.cli import main

    commands = set(re.findall(r"`?ocvtp ([a-z]+(?:-[a-z]+)*)", README))
    assert commands >= {"train", "export", "resize", "list", "answer", "show"}
    for command in commands - {"train"}:
        with pytest.raises(SystemExit) as status:
            main([command, "--help"])
        assert status.value.code == 0
        text = capsys.readouterr().out
        for flag in re.findall(rf"ocvtp {command} ([^`\n|#]*)", README):
            for name in re.findall(r"--[a-z][a-z-]+", flag):
                assert name in text, f"ocvtp {command} has no {name}"


def test_its_python_names_exist():
    for name in re.findall(r"ocvtp\.([A-Za-z_]+)\(", README):
        assert hasattr(ocvtp, name), name


def test_the_pruner_of_contributing_works_in_forty_lines():
    import types

    import torch

    text = Path("CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(code.splitlines()) <= 50
    from ocvtp.pruners import registry

    module = sys.modules["norm"] = types.ModuleType("norm")
    try:
        exec(compile(code, "norm.py", "exec"), vars(module))
        features = torch.arange(12.0).view(1, 6, 2)
        tokens = VisualTokens(features, (2, 3), hidden={-2: features})
        kept = ocvtp.build_pruner("norm", num_keep=2).select(tokens).keep_indices
        assert kept.tolist() == [[4, 5]]
    finally:
        registry._REGISTRY.pop("norm", None)
        del sys.modules["norm"]


def test_the_project_speaks_of_itself_alone():
    files = [p for p in Path(".").rglob("*") if p.suffix in {".py", ".md", ".yaml", ".toml"}]
    for path in files:
        if ".venv" in path.parts or path.parts[0] in ("outputs", "tests", "lightning_logs"):
            continue
        text = path.read_text()
        for word in ("/work/", "/root/", "shared/coco"):
            assert word not in text, f"{path}: {word}"
