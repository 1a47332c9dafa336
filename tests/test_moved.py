"""Plug-ins and settings of earlier versions find what they import."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from ocvtp.moved import HOMES, home_of


@pytest.mark.parametrize("name", [*HOMES, "ocvtp.pruners.uniform", "ocvtp.pruners.random"])
def test_one_module_has_two_names(name, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    home = importlib.import_module(home_of(name))
    with pytest.warns(DeprecationWarning, match=f"{name} is now {home.__name__}"):
        assert importlib.import_module(name) is home
    assert home.__name__ == home.__spec__.name == home_of(name)


@pytest.mark.slow
def test_a_plug_in_of_yesterday_works():
    code = (
        "from ocvtp.pruners.base import Pruner\n"
        "from ocvtp.pruners.registry import register\n"
        "from ocvtp.pruners.selection import top_k\n"
        "from ocvtp.pruners.layered import LayerPruner, OneStagePruner\n"
        "from ocvtp.pruners.uniform import Uniform\n"
        "from ocvtp.pruners import uniform, LayerPruner as same\n"
        "from ocvtp.files import replacing\n"
        "assert same is LayerPruner and uniform.Uniform is Uniform\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name", ["ocvtp.pruners.nothing", "ocvtp.selection", "ocvtp.pruners.methods.x"]
)
def test_other_names_are_not_found(name):
    with pytest.raises(ModuleNotFoundError, match=name):
        importlib.import_module(name)
