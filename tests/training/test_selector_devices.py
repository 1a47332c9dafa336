"""Scorers that learn in two processes, and in bf16."""

from __future__ import annotations

import csv
import math
from functools import cache
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from fresh_process import TRAINS, in_two_processes, outputs
from torch.testing import assert_close

from ocvtp.training.run import train

RECIPES = ("mask", "distil", "kl", "visionselector", "noise", "glimpse", "surrogate")
# Trains with words of the command line, and writes for every process what it was given and made.
SPY = """
import sys
import pytorch_lightning as pl
import torch
from ocvtp.training.run import build

class Spy(pl.Callback):
    def __init__(self):
        self.seen = {"keys": [], "budgets": [], "gradients": [], "validated": []}

    def on_fit_start(self, trainer, module):
        step = module._step
        def spied(batch, asked, num_keep, *rest):
            if module.training:
                self.seen["budgets"].append(num_keep)
            return step(batch, asked, num_keep, *rest)
        module._step = spied

    def on_train_batch_start(self, trainer, module, batch, number):
        self.seen["keys"].append(batch["keys"])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen["gradients"].append([p.grad.clone() for p in module.network.parameters()])

    def on_validation_batch_start(self, trainer, module, batch, number, loader=0):
        self.seen["validated"].append(batch["keys"])

    def on_fit_end(self, trainer, module):
        self.seen["figures"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.seen["weights"] = dict(module.network.state_dict())
        torch.save(self.seen, f"{folder}/rank{trainer.global_rank}.pt")

folder, *words = sys.argv[1:]
cli = build(words)
cli.trainer.callbacks.append(Spy())
cli.trainer.fit(cli.model, cli.datamodule)
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of drawn scenes, filled by the first run."""
    return tmp_path_factory.mktemp("scenes")


def words_of(recipe, scenes, output, **more):
    """Of a run over 24 questions, validated on 8."""
    settings = {
        "data.root": scenes, "data.num_train": 6, "data.num_val": 2, "data.questions": 4,
        "data.batch_size": 4, "model.scorer.dim": 16, "trainer.max_steps": 3,
        "trainer.val_check_interval": 3, "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false", "model.statistics_questions": 8,
        "output": output,
    }  # fmt: skip
    if recipe == "kl":
        settings["model.warm_start"] = "null"
    settings |= {name.replace("__", "."): value for name, value in more.items()}
    found = ["--config", f"configs/train/selector/{recipe}.yaml"]
    return [*found, *(f"--{name}={value}" for name, value in settings.items())]


def spied(folder: Path, scenes: Path, together: bool = False, **more):
    """What each process of a run saw: this one, or two others together."""
    folder.mkdir()
    losses = "{kl: {}, ce: {}}"  # which count every question
    words = words_of(
        "kl", scenes, folder / "run", model__losses=losses, trainer__accelerator="cpu", **more
    )
    if together:
        code = f"import sys; sys.argv[1:] = {[str(folder), *words]}\n{SPY}"
        outputs([in_two_processes(code)], first=TRAINS)
    else:
        with patch("sys.argv", ["spy", str(folder), *words]):
            exec(SPY, {})
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]


@pytest.mark.slow
def test_two_processes_learn_as_one(scenes, tmp_path):
    (alone,) = spied(tmp_path / "alone", scenes, data__batch_size=8)
    ranks = spied(
        tmp_path / "together", scenes, together=True, trainer__devices=2, trainer__strategy="ddp",
        data__val_batch_size=4,
    )  # fmt: skip
    assert len(ranks) == 2
    keys = [key for rank in ranks for batch in rank["keys"] for key in batch]
    assert sorted(keys) == sorted(key for batch in alone["keys"] for key in batch)
    assert len(keys) == len(set(keys)) == 24
    validated = [key for rank in ranks for batch in rank["validated"] for key in batch]
    assert len(validated) == len(set(validated)) == 8
    assert ranks[0]["budgets"] == ranks[1]["budgets"] == alone["budgets"]
    assert len(alone["budgets"]) == 3
    for rank in ranks:
        assert len(rank["gradients"]) == 3
        for found, expected in zip(rank["gradients"], alone["gradients"], strict=True):
            assert_close(found, expected, rtol=1e-3, atol=1e-5)
    # Beside those of the run alone, weights that have no gradient but rounding differ: AdamW.
    for one, other in zip(*(rank["weights"].values() for rank in ranks), strict=True):
        assert torch.equal(one, other)
    figures = {name for name in alone["figures"] if name.startswith("val/")}
    assert {"val/kl_16", "val/accuracy_8_untrained", "val/ce_8_random"} <= figures
    for name in figures:
        if not name.endswith("_random"):  # drawn for each process and batch
            for rank in ranks:
                assert rank["figures"][name] == pytest.approx(alone["figures"][name], abs=2e-3)


MIXED = {"trainer__precision": "bf16-mixed"}
HOST = {"model__host__dtype": "bfloat16"}
PRECISIONS = [*product(RECIPES, [MIXED, HOST]), ("kl", MIXED | HOST)]


@pytest.fixture(scope="module")
def losses(scenes, tmp_path_factory):
    """The first loss of a recipe, and figures of its run, by precision; each run once."""

    @cache
    def run(recipe, **precision):
        folder = tmp_path_factory.mktemp(recipe)
        more = {"trainer__log_every_n_steps": 1, **precision}
        result = train(words_of(recipe, scenes, folder, **more))
        (log,) = folder.rglob("metrics.csv")
        rows = list(csv.DictReader(log.open()))
        first = next(float(row["train/loss"]) for row in rows if row["train/loss"])
        figures = {k: float(v) for row in rows for k, v in row.items() if v}
        return first, figures, torch.load(result.last, weights_only=True)["state_dict"]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "precision"), PRECISIONS, ids=str)
def test_bf16(recipe, precision, losses):
    first, figures, state = losses(recipe, **precision)
    for name, values in state.items():
        assert values.dtype in (torch.float32, torch.int64), name
        assert values.isfinite().all(), name
    assert {"val/loss", "val/kl_8", "train/loss"} <= figures.keys()
    assert all(math.isfinite(value) for value in figures.values()), figures
    assert first == pytest.approx(losses(recipe)[0], rel=0.05)
