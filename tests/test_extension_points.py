"""What is added from outside costs one file, and one word that names it.

Each toy is one file in an empty folder. A command learns of it by `--import FILE`; the word after
its own flag (`--pruners`, `--task`, `--model`, or a line of YAML) names it. Nothing of the package
is edited, and no toy imports a private name.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from fresh_process import RUN, outputs

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "checkpoints" / "demo-vlm")
METHOD = '''"""Brightest: keep the K tokens with the largest sum of features."""

from dataclasses import dataclass

from ocvtp.ops.selection import top_k
from ocvtp.pruners.base import Pruner
from ocvtp.pruners.registry import register
from ocvtp.structures import Selection, VisualTokens


@register("brightest")
@dataclass(kw_only=True, eq=False)
class Brightest(Pruner):
    """Brightest: keep the K tokens with the largest sum of features."""

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        return top_k(tokens.features.sum(dim=2), num_keep, tokens.valid)
'''
OBJECTIVE = '''"""One more objective for the network of the OC-pruner: slots that differ."""

from ocvtp.learning import Objective, Outcome
from ocvtp.slots import OCPruner


class Apart(Objective[OCPruner]):
    """The mean cosine between different slots."""

    name = "apart"
    trains = OCPruner

    def __call__(self, network, tokens, num_keep, objects=None):
        features = tokens.hidden[network.config.layer].float()
        slots, attention = network.assign(features, num_keep, valid=tokens.valid)
        units = slots / slots.norm(dim=2, keepdim=True)
        cosines = units @ units.transpose(1, 2)
        others = cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()
        return Outcome(others / cosines.numel(), slots=slots, attention=attention)
'''
SETTINGS = f"""
model:
  encoder:
    class_path: ocvtp.encoders.clip.CLIPEncoder
    init_args: {{tower: {DEMO}, layer: 3}}
  objective: {{class_path: apart.Apart}}
  network: {{hidden_dim: 16, slot_dim: 8, ffn_dim: 16}}
  num_slots: [4]
data:
  class_path: ocvtp.data.module.SceneDataModule
  init_args: {{root: scenes, num_train: 4, num_val: 2, batch_size: 2}}
trainer: {{max_epochs: 1, accelerator: cpu, logger: false, enable_progress_bar: false}}
"""


def page(name: str) -> str:
    """The file that a page of the documentation shows."""
    text = (ROOT / "docs" / name).read_text()
    return re.search(r"```py(?:thon)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]


TOYS = {
    "brightest": METHOD,
    "squares": page("add-a-task.md"),
    "toy_family": (ROOT / "tests" / "hosts" / "toy_family.py").read_text(),
    "apart": OBJECTIVE,
    "linear_scorer": page("add-a-learned-pruner.md"),
    "outlying": page("add-a-scorer.md"),
    "unlike": page("add-a-loss.md"),
}
ONE = ["--num-images", "1", "--no-controls", "--pruners", "divprune"]
ASKED = ["--levels", "easy", "--num-images", "2", "--batch-size", "8", "--no-controls"]
FOUR = ["--num-keep", "4"]
OUT = ["--num-keep", "16", "--output", "out"]
PICTURE = ["--image", "picture.png", "--prompt", "What?", "--max-new-tokens", "2"]
COMMANDS = {
    "brightest": [
        ["list", "--json"],
        ["evaluate", "--model", DEMO, "--task", "scenes", *ASKED, "--pruners", "brightest", *OUT],
    ],
    "squares": [["evaluate", "--model", DEMO, "--task", "squares", *ONE, *OUT]],
    "toy_family": [
        ["answer", "--model", "random:tiny-toy", "--pruner", "divprune", *FOUR, *PICTURE],
        ["flops", "--model", "random:tiny-toy", "--pruners", "divprune", *FOUR],
    ],
    "apart": [["train", "--config", "settings.yaml", "--output", "out"]],
}
"""What is done with each toy."""
TOLD = ("linear_scorer", "outlying", "unlike")
"""Tried as a whole in tests/training/test_trainable.py, and in tests/selectors/ in
test_scorer_registry.py and losses/test_plug_in.py."""


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_one_file_of_public_names(name: str) -> None:
    tree = ast.parse(TOYS[name])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ocvtp"):
            private = [one.name for one in node.names if one.name.startswith("_")]
            assert not private, f"{name} imports {private}"
    assert len(TOYS[name].splitlines()) < 130


@pytest.mark.slow
def test_a_toy_works_where_nothing_but_its_file_is(tmp_path: Path) -> None:
    """Each command in a fork of one process, which has imported nothing of the package."""
    folders, codes = [], []
    for name, commands in COMMANDS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(TOYS[name])
        (folder / "settings.yaml").write_text(SETTINGS)
        shutil.copy(ROOT / "docs" / "images" / "scene.png", folder / "picture.png")
        for words in commands:
            folders.append(folder)
            codes.append(RUN.format(words=["--import", f"{name}.py", *words]))
    (tmp_path / "told").mkdir()
    imports = []
    for name in TOLD:
        (tmp_path / "told" / f"{name}.py").write_text(TOYS[name])
        imports += ["--import", f"{name}.py"]
    folders.append(tmp_path / "told")
    codes.append(RUN.format(words=[*imports, "list", "--json"]))
    first = "import torch, transformers, pytorch_lightning"
    listed, evaluated, asked, answered, counted, _, told = outputs(
        codes, first=first, folders=folders
    )
    assert '"name": "brightest"' in listed
    assert "brightest" in evaluated
    for said in (asked, answered, counted):
        assert "divprune" in said
    assert list(tmp_path.glob("apart/out/checkpoints/*.ckpt"))
    for name, pruner in (("brightest", "brightest"), ("squares", "divprune")):
        found = json.loads((tmp_path / name / "out" / "results.json").read_text())
        assert any(row["pruner"] == pruner for row in found["rows"])
    assert '"name": "linear"' in told


def test_files_of_the_package_that_a_new_family_and_a_new_method_touch() -> None:
    """Inside of the package: a method names itself, a family and a task have one line each."""
    from ocvtp.choices import FAMILIES
    from ocvtp.evaluation.tasks.registry import BUILT_IN
    from ocvtp.pruners import list_pruners

    methods = {path.stem for path in (ROOT / "ocvtp/pruners/methods").glob("*.py")} - {"__init__"}
    assert methods <= set(list_pruners())
    homes = {home.partition(".")[0] for home in FAMILIES.values()}
    for home in homes:
        assert (ROOT / "ocvtp/hosts/families" / f"{home}.py").is_file()
    for task in BUILT_IN:
        assert (ROOT / "ocvtp/evaluation/tasks" / f"{task}.py").is_file()
