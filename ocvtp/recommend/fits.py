"""Which of the registered pruners a model can run, and what the others would need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ocvtp.bench.variants import lacking_network, network_for
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.hosts.registry import find_host
from ocvtp.pruners import Pruner, list_pruners
from ocvtp.pruners.specs import build_spec, known_settings
from ocvtp.reporting.command_line import as_typed

Status = Literal["runs", "needs", "cannot"]
_PIXELS = 224  # along a side of the picture that they are tried on
_KEEP = 0.25
_NETWORK = "a trained network: pass --checkpoint, see `ocvtp train`."


@dataclass(frozen=True)
class Fit:
    """What a pruner comes to on a model.

    Args:
        name: in the registry.
        status: `runs`; `needs` something that was not given; or `cannot`.
        what: what it needs, or why it cannot; empty where it runs.
    """

    name: str
    status: Status
    what: str = ""


@torch.no_grad()
def fits(subject: Subject) -> list[Fit]:
    """All registered pruners, each run once on a small drawn picture, a quarter of its tokens kept.

    A pruner that is trained gets random weights: what it lacks is a network, if nothing else. One
    that drops tokens between layers of the language model, and cannot keep so few on average or at
    its usual layers, is tried with a stage of its own.
    """
    task = SceneTask(levels=("easy",), num_images=1, questions=1, size=_PIXELS)
    inputs = subject.inputs(task, task.items, [0])
    num_keep = max(1, round(_KEEP * subject.shape(task)[0]))
    return [_fit(subject, name, inputs, num_keep) for name in list_pruners()]


def _fit(subject: Subject, name: str, inputs: Any, num_keep: int) -> Fit:
    pruner, network, lacks_network = None, None, bool(lacking_network([name], None))
    try:
        network = network_for(subject, inputs.first, name) if lacks_network else None
        pruner = build_spec(name, num_keep=num_keep, network=network)
        subject.attempt(pruner, inputs, subject.sharing([pruner]))
    except ValueError as error:
        why = as_typed(" ".join(str(error).split()))
        if _lacks_text_tower(subject, pruner):
            return Fit(name, "needs", why)
        if "stages" in known_settings(name):
            spec = f"{name}:stages=[[{1 if network is None else network.config.layer},K]]"
            if _runs(subject, spec, inputs, network):
                what = f"stages: pass e.g. {spec}. Without: {why}"
                return Fit(name, "needs", f"{_NETWORK} And {what}" if lacks_network else what)
        return Fit(name, "cannot", why)
    if lacks_network:
        return Fit(name, "needs", _NETWORK)
    return Fit(name, "runs")


def _runs(subject: Subject, spec: str, inputs: Any, network: Any) -> bool:
    try:
        pruner = build_spec(spec, num_keep=1, network=network)
        subject.attempt(pruner, inputs, subject.sharing([pruner]))
    except ValueError:
        return False
    return True


def _lacks_text_tower(subject: Subject, pruner: Pruner | None) -> bool:
    """Whether the host can show a pruner all but the prompt in CLIP's space."""
    if pruner is None or subject.text_tower is not None or not pruner.tower_needs.clip:
        return False
    try:
        find_host(subject.model).check(pruner.tower_needs)
    except ValueError:
        return False
    return True
