"""`ocvtp demo-vlm`: the recipe of the demo VLM, which is in the repository, not in the package."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from ocvtp.shipped import ROOT


def run(arguments: argparse.Namespace) -> int:
    """Run the recipe of the checkout that this package is in.

    Raises:
        ValueError: outside of a checkout.
    """
    try:
        recipe = import_module("tools.demo_vlm.recipe")
        is_ours = ROOT in Path(str(recipe.__file__)).parents
    except ModuleNotFoundError:
        is_ours = False
    if not is_ours:
        raise ValueError(
            "the recipe of the demo VLM is in the repository, not in the installed package; clone"
            " it, `pip install --editable .`, and run this again."
        )
    return int(recipe.run(arguments))
