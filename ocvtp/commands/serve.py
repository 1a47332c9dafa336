"""`ocvtp serve`: `vllm serve` with the settings of the plug-in filled in."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ocvtp.commands import options, output
from ocvtp.hosts.loading import load_config
from ocvtp.serving.plan import KEY, Plan, read_plan
from ocvtp.serving.vllm_plugin import check_version
from ocvtp.shipped import find_folder, find_weights

_OVERRIDES = "--hf-overrides"
_MODULE = "vllm.entrypoints.cli.main"


def run(arguments: argparse.Namespace) -> int:
    """Become `vllm serve`, or print its command."""
    model, settings, _ = served(arguments)
    words = ["serve", model, _OVERRIDES, overrides(arguments, settings), *arguments.further]
    if arguments.dry_run:
        shown = ["vllm", *words]
        output.emit({"command": shown}, shlex.join(shown), arguments.json)
        return 0
    check_vllm()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", _MODULE, *words])


def served(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], Plan]:
    """Model, settings and plan of flags of `options.add_served`; no weights of the model are read.

    Raises:
        ValueError: if there is no such model, or if it or the pruner cannot be served.
    """
    model = find_weights(arguments.model)
    if model.startswith("random:"):
        raise ValueError(f"vLLM does not know {model!r}; pass a folder or hub id of a model.")
    settings = options.served_settings(arguments)
    if (checkpoint := settings.get("checkpoint")) is not None:  # vLLM may run in another folder
        found = Path(find_folder(checkpoint))
        settings["checkpoint"] = str(found.absolute()) if found.exists() else checkpoint
    config = load_config(model)
    setattr(config, KEY, settings)
    return model, settings, read_plan(config)


def overrides(arguments: argparse.Namespace, settings: dict[str, Any]) -> str:
    """What --hf-overrides is to be, that of the user included.

    Raises:
        ValueError: for one that is no JSON object, or that sets what this command does.
    """
    if dotted := [word for word in arguments.further if word.startswith(_OVERRIDES + ".")]:
        raise ValueError(f"{dotted[0]}; pass {_OVERRIDES} as one JSON object.")
    try:
        own = json.loads(arguments.hf_overrides)
    except ValueError as error:
        own, reason = None, f" ({error})"
    else:
        reason = ""
    if not isinstance(own, dict):
        raise ValueError(f"{_OVERRIDES} {arguments.hf_overrides} is no JSON object{reason}.")
    if KEY in own:
        raise ValueError(f"{_OVERRIDES} sets {KEY!r}, as --pruner does; leave it out there.")
    return json.dumps({**own, KEY: settings})


def check_vllm() -> None:
    """Refuse an environment in which vLLM would not prune.

    Raises:
        ValueError: without vLLM, on versions that were not tested, and where vLLM does not find the
            plug-in.
    """
    if find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed here; in a clone, pip install -e '.[vllm]' into an environment"
            " of its own, or serve without it (see the documentation, Serve)."
        )
    check_version()
    if not entry_points(group="vllm.general_plugins", name="ocvtp"):
        raise ValueError(
            "vLLM would not find the plug-in: ocvtp is not installed in this environment; pip"
            " install it there."
        )
