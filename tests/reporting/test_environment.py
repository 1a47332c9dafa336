"""What figures depend on is told of a checkout too that no installer knows."""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

import ocvtp
from ocvtp.reporting.environment import environment_of
from ocvtp.training.summary import training_summary

MODEL = SimpleNamespace(device="cpu", dtype=torch.bfloat16)


@pytest.fixture
def uninstalled(monkeypatch):
    """`ocvtp` runs by PYTHONPATH alone."""
    known = Distribution.from_name

    def from_name(name):
        if name == "ocvtp":
            raise PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(Distribution, "from_name", from_name)


def test_of_figures(uninstalled):
    found = environment_of(MODEL)
    assert found["ocvtp"].startswith(ocvtp.__version__)
    assert found["dtype"] == "bfloat16"


def test_of_a_training(uninstalled, monkeypatch):
    monkeypatch.setattr("ocvtp.training.summary.epochs_run", lambda trainer: 1)
    trainer = SimpleNamespace(
        train_dataloader=None, global_step=0, world_size=1, precision="32-true", callback_metrics={}
    )
    assert training_summary(trainer, {}, 8)["versions"]["ocvtp"] == ocvtp.__version__


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment_of(MODEL)["ocvtp"] == ocvtp.__version__
