"""Which of the registered pruners a model can run, and what the others would need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, Literal, get_args, get_origin

import torch

from ocvtp.bench.variants import lacking_network, network_for
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.field_types import hints
from ocvtp.hosts.registry import find_host
from ocvtp.pruners import Pruner, list_pruners, pruner_class
from ocvtp.pruners.specs import build_spec, known_settings
from ocvtp.reporting.command_line import as_typed

Status = Literal["runs", "needs", "cannot"]
_PIXELS = 224  # along a side of the picture that they are tried on
_KEEP = 0.25
_BLOCKS = 24  # of LLaVA-1.5's tower, which the methods' own numbers are of
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
    that cannot run as it is, is tried with other values of its own settings, see `_changes`.
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
        for changes in _changes(subject, name, network):
            told = ",".join(f"{setting}={value}" for setting, value in changes.items())
            count = 1 if "stages" in changes else num_keep
            if _runs(subject, f"{name}:{told}", count, inputs, network):
                what = f"{' and '.join(changes)}: pass e.g. {name}:{told}. Without: {why}"
                return Fit(name, "needs", f"{_NETWORK} And {what}" if lacks_network else what)
        return Fit(name, "cannot", why)
    if lacks_network:
        return Fit(name, "needs", _NETWORK)
    return Fit(name, "runs")


def _changes(subject: Subject, name: str, network: Any) -> Iterator[dict[str, str]]:
    """Settings of a pruner that may make it fit where its own do not: one, then two at a time.

    Those are another of the values that a setting may have, where they are named; 0 for a weight of
    something that the model has not; for a block of the tower the one as far inside of this tower
    as it is inside of LLaVA-1.5's; and a stage of its own for what cannot keep so few on average,
    or at its usual layers.
    """
    cls, depth = pruner_class(name), subject.num_tower_blocks
    kinds = hints(cls)
    single: list[dict[str, str]] = []
    for field in fields(cls):
        kind, usual = kinds.get(field.name), field.default
        if get_origin(kind) is Literal:
            single += [{field.name: str(v)} for v in get_args(kind) if v != usual]
        elif kind is int and field.name.endswith("block") and isinstance(usual, int):
            block = round(usual * depth / _BLOCKS) if usual >= 0 else -1
            single += [{field.name: str(block)}] if block != usual else []
        elif kind is float and usual:
            single.append({field.name: "0.0"})
    if "stages" in known_settings(name):
        layer = 1 if network is None else network.config.layer
        single.append({"stages": f"[[{layer},K]]"})
    yield from single
    for one, other in combinations(single, 2):
        if one.keys() != other.keys():
            yield one | other


def _runs(subject: Subject, spec: str, num_keep: int, inputs: Any, network: Any) -> bool:
    try:
        pruner = build_spec(spec, num_keep=num_keep, network=network)
        subject.attempt(pruner, inputs, subject.sharing([pruner]))
    except Exception:  # nobody chose these values: a plug-in may divide by one that is 0 now
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
