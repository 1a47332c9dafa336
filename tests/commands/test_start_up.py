"""What is imported when: nobody waits for what is not asked for."""

from __future__ import annotations

import ast
import json
from functools import cache
from itertools import chain
from pathlib import Path
from typing import get_args

import pytest
from fresh_process import outputs

import ocvtp
from ocvtp import choices
from ocvtp.cli import _COMMANDS as COMMANDS
from ocvtp.commands.flags import FLAGS
from ocvtp.evaluation.tasks.registry import BUILT_IN

HEAVY = {
    "torch", "numpy", "transformers", "torch._dynamo", "pytorch_lightning", "matplotlib", "timm",
    "scipy", "torchvision", "PIL", "huggingface_hub", "rich", "jsonargparse", "pycocotools",
}  # fmt: skip
RUN = "from ocvtp.cli import main; main({words})"
LISTS = [RUN.format(words=words) for words in (["list"], ["list", "--json"])]
BUILDS = "import ocvtp; ocvtp.build_pruner('fastv', num_keep=4)"
NAMES = "from ocvtp import *; attach"
BARE = "import ocvtp"
PARTS = [
    f"import ocvtp; assert ocvtp.{part}.__name__ == 'ocvtp.{part}', ocvtp.{part}"
    for part in ("encoders", "hosts", "pruners", "slots", "structures")
]
ATTACHES = """
import sys
import torch
from ocvtp.pruners import Compose, build_pruner
assert "ocvtp.hosts" not in sys.modules
for pruner in (build_pruner("uniform", num_keep=4), Compose([build_pruner("none")])):
    try:
        with pruner(torch.nn.Linear(1, 1)): pass
    except ValueError as error:
        assert "is not supported" in str(error), error
    else:
        raise SystemExit("attached to no model")
"""
SEEN = """
import atexit, json, sys
try:
    exec({code!r}, {{"__name__": "__main__"}})
except SystemExit as end:
    assert end.code in (None, 0, 2), end
atexit._run_exitfuncs()
print("imported", json.dumps([name for name in {heavy} if name in sys.modules]))
"""
TIMED = """
import os
try:
    exec({code!r})
except SystemExit:
    pass
spent = os.times()
print(spent.user + spent.system)
"""


def imported(*codes: str, first: str = "") -> list[set[str]]:
    """Heavy modules that a process has after each code, which may exit."""
    heavy = sorted(HEAVY)
    found = outputs([SEEN.format(code=code, heavy=heavy) for code in codes], first=first)
    lines = [text.splitlines()[-1] for text in found]
    return [set(json.loads(line.removeprefix("imported "))) for line in lines]


@cache
def after_torch() -> dict[str, set[str]]:
    """What is imported by code that needs torch."""
    codes = [*LISTS, BUILDS, NAMES, *PARTS, ATTACHES]
    return dict(zip(codes, imported(*codes, first="import torch"), strict=True))


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["no-such"], *([name, "--help"] for name in FLAGS)],
    ids=str,
)
def test_help_imports_nothing_that_takes_long(words):
    assert imported(RUN.format(words=words)) == [set()]


def test_a_misspelt_flag_is_refused_at_once():
    assert imported(RUN.format(words=["evaluate", "--modle", "x"])) == [set()]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_task_says_its_flags_and_refuses_others_at_once(name):
    words = [["--task", name, "--help"], ["--task", name, "--num-images", "few"]]
    words.append(["--task", f"{name}x"])
    codes = [RUN.format(words=["evaluate", *some]) for some in words]
    assert imported(*codes) == [set()] * 3


@pytest.mark.slow
def test_a_list_imports_torch_and_what_draws_the_table():
    for code in LISTS:
        assert after_torch()[code] <= {"torch", "numpy", "rich"}


@pytest.mark.slow
def test_what_reads_results_waits_for_no_torch(tmp_path):
    judged, timed = (f"docs/results/{name}" for name in ("demo-vlm", "bench-llava-mid-cpu"))
    table = ["table", judged, "--num-keep", "36"]
    compare = ["compare", f"{timed}/results.json", f"{timed}/results.json"]
    plot = ["plot", judged, "--plots", "accuracy", "--output", str(tmp_path)]
    card = ["card", "checkpoints/demo-pruner", "--results", judged]
    words = [table, compare, ["runs", "docs/results/train-demo"], plot, card]
    found = imported(*(RUN.format(words=some) for some in words))
    drawn, networks = {"numpy", "PIL", "matplotlib"}, {"torch", "numpy", "PIL", "huggingface_hub"}
    allowed = [{"numpy", "PIL"}, {"numpy"}, {"rich"}, drawn, networks]
    assert [some - those for some, those in zip(found, allowed, strict=True)] == [set()] * 5


@pytest.mark.slow
def test_the_package_and_its_names():
    assert imported("import ocvtp; ocvtp.__version__; dir(ocvtp)") == [set()]
    assert after_torch()[BUILDS] <= {"torch", "numpy"}
    assert after_torch()[NAMES] <= {"torch", "numpy", "huggingface_hub"}


def test_every_name_is_found_where_editors_look_for_it():
    assert set(ocvtp.__all__) <= set(dir(ocvtp))
    tree = ast.parse(Path("ocvtp/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    for node in block.body:
        for alias in node.names:
            home = __import__(node.module, fromlist=[alias.name])
            assert getattr(ocvtp, alias.name) is getattr(home, alias.name)
    assert {alias.name for node in block.body for alias in node.names} == set(ocvtp.__all__)
    with pytest.raises(AttributeError, match="module 'ocvtp' has no attribute 'build_prunner'"):
        _ = ocvtp.build_prunner
    assert not hasattr(ocvtp, "torch")


@pytest.mark.slow
def test_parts_of_the_package_are_its_attributes():
    assert after_torch().keys() > set(PARTS)  # each was run to its end


@pytest.mark.slow
def test_a_pruner_attaches_whatever_was_imported_before():
    assert ATTACHES in after_torch()


def test_every_command_has_flags():
    assert FLAGS.keys() == COMMANDS.keys() - {"train", "extract", "teacher"}


def test_choices_are_what_there_is():
    from ocvtp.data.scenes import LEVELS
    from ocvtp.hosts.loading import load_config

    assert get_args(choices.Level) == tuple(LEVELS)
    for name in chain(choices.TINY_MODELS, get_args(choices.FullSizeModel)):
        assert load_config(name).model_type


@pytest.mark.slow
def test_what_is_not_compiled_runs_eagerly_in_compiled_code():
    import torch

    from ocvtp.towers.module_state import uncompiled

    seen, graphs = [], []

    def length(x):
        seen.append(torch.compiler.is_compiling())
        return len(x.tolist())  # what no graph holds

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def whole(x):
        return apart((x + 1) * 2) + x

    for warm in (False, True):
        torch.compiler.reset()
        apart = uncompiled(length)
        assert apart.__name__ == "length"
        if warm:
            assert apart(torch.ones(2)) == 2
        seen.clear()
        graphs.clear()
        compiled = torch.compile(whole, backend=backend)
        assert [compiled(torch.ones(3)).tolist() for _ in range(2)] == [[4.0] * 3] * 2
        assert seen == [False, False]
        assert len(graphs) == 2  # before and after


@pytest.mark.slow
def test_time_to_start():
    """Least processor time of some processes, with a margin for noise."""
    limits = {RUN.format(words=["list"]): 1.2, RUN.format(words=["--help"]): 0.5, BARE: 0.5}
    rounds = list[list[float]]()
    for _ in range(3):  # noise is no fault
        rounds.append(processor_times("import torch", *limits))
        torch, *own = (min(times) for times in zip(*rounds, strict=True))
        most = [1.15 * limit * torch for limit in limits.values()]
        if all(one <= limit for one, limit in zip(own, most, strict=True)):
            return
    pytest.fail(f"{own} s, where import torch takes {torch:.2f}")


def processor_times(*codes: str) -> list[float]:
    """Seconds of each in a process of its own, without the time that it waited."""
    found = outputs([TIMED.format(code=code) for code in codes])
    return [float(text.splitlines()[-1]) for text in found]
