"""The README and CONTRIBUTING say what is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import ocvtp
from ocvtp.structures import VisualTokens

README = Path("README.md").read_text()


def test_its_python_names_exist():
    for name in re.findall(r"ocvtp\.([A-Za-z_]+)\(", README):
        assert hasattr(ocvtp, name), name


def test_the_pruner_of_contributing_works_in_forty_lines():
    import types

    import torch

    text = Path("CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(code.splitlines()) <= 50
    imports = re.findall(r"^from ocvtp.*", code, re.MULTILINE)
    assert imports == sorted(imports)  # or `make lint` refuses what was copied
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
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".css", ".svg"}
    apart = {".venv", ".git", "outputs", "tests", "lightning_logs"}  # also of many thousand files
    tops = [path for path in Path(".").iterdir() if path.name not in apart]
    files = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top])]
    found = [path for path in files if path.suffix in kinds]
    assert len(found) > 500
    for path in [*found, Path("Makefile"), Path(".ci/run")]:
        text = path.read_text()
        for word in ("/work/", "/root/", "shared/coco", "ocvtp["):  # it is on no index: `.[serve]`
            assert word not in text, f"{path}: {word}"
