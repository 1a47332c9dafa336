"""Which checkpoints are seeds of one training, and which are different pruners."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from safetensors.torch import save

from ocvtp.evaluation.conditions import content_hash
from ocvtp.learning import artifact

_SEEDS = ("noise_seed", "training.data.seed", "training.seed")
_VERSIONS = "training.versions."
_FOUND = (
    "training.validation.", "training.curve",  # results of the training, not its settings
    _VERSIONS,  # what it ran on
    *(
        f"training.data.{how}"  # is loaded, not what
        for how in ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor")
    ),
)  # fmt: skip
_SHOWN = 3
_NOTHING = object()


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One checkpoint, and what it says of its training.

    Args:
        path: folder or hub id.
        weights: a hash of them.
        asked: settings of its training but the seed, by dotted names; None where they are unknown.
        seed: of its training.
        versions: of what it was trained with, by dotted names.
    """

    path: str
    weights: str
    asked: Mapping[str, Any] | None
    seed: tuple[Any, ...]
    versions: Mapping[str, Any] = field(default_factory=dict)

    def is_seed_of(self, other: Checkpoint) -> bool:
        """Whether the two differ in nothing but the seed."""
        return self.asked is not None and self.asked == other.asked and self.seed != other.seed

    def is_alike(self, other: Checkpoint) -> bool:
        """Whether both may be of one pruner: not known to have other formats or stages."""
        asked = [known.asked for known in (self, other) if known.asked is not None]
        return len({(one["format"], one.get("stage")) for one in asked}) < 2


def grouped(paths: Sequence[str]) -> tuple[list[list[str]], str]:
    """Group the checkpoints of one training with several seeds.

    Args:
        paths: folders or hub ids of exported networks, or of what another pruner takes.

    Returns:
        the groups, and what a reader must know of them: why one pruner has several, and where
        seeds were trained with other versions; the empty text where there is nothing.

    Raises:
        ValueError: if two hold the same weights.
    """
    if len(paths) < 2:
        return [list(paths)], ""
    groups: list[list[Checkpoint]] = []
    for checkpoint in _read(paths):
        for group in groups:
            if all(checkpoint.is_seed_of(member) for member in group):
                group.append(checkpoint)
                break
        else:
            groups.append([checkpoint])
    found = [[checkpoint.path for checkpoint in group] for group in groups]
    remarks = [_told_versions(group) for group in groups]
    alike = [(a[0], b[0]) for a, b in combinations(groups, 2) if a[0].is_alike(b[0])]
    if alike:
        first, second = alike[0]
        remarks.append(
            f"checkpoints {first.path} and {second.path} are no seeds of one training"
            f" ({_differences(first, second)}), so they are not averaged: each has its own rows."
        )
    return found, " ".join(filter(None, remarks))


def _told_versions(group: Sequence[Checkpoint]) -> str:
    """Where seeds of one training were trained with other versions."""
    first = group[0]
    other = next((one for one in group if one.versions != first.versions), None)
    if other is None:
        return ""
    return (
        f"checkpoints {first.path} and {other.path} are averaged as seeds of one training, and were"
        f" trained with other versions ({_told(first.versions, other.versions)})."
    )


def _read(paths: Sequence[str]) -> Iterator[Checkpoint]:
    """Read each; two of the same weights are refused."""
    seen: dict[str, str] = {}
    for path in paths:
        checkpoint = _checkpoint(path)
        if checkpoint.weights in seen:
            raise ValueError(
                f"checkpoints {seen[checkpoint.weights]} and {path} hold the same weights: one run"
                " is not two seeds; pass it once."
            )
        seen[checkpoint.weights] = path
        yield checkpoint


def _checkpoint(path: str) -> Checkpoint:
    try:
        format, config, weights = artifact.read_any(path)
    except ValueError:  # another pruner's own kind, which reports its faults itself
        return Checkpoint(path, content_hash(path), None, ())
    known = {"format": format, **dict(_flat(config))}
    seed = tuple(known.pop(name, None) for name in _SEEDS)
    asked = {name: value for name, value in known.items() if not name.startswith(_FOUND)}
    tensors = save({name: weights[name].contiguous() for name in sorted(weights)})
    versions = {name: value for name, value in known.items() if name.startswith(_VERSIONS)}
    return Checkpoint(path, hashlib.sha256(tensors).hexdigest(), asked, seed, versions)


def _flat(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted names."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}.")
        else:
            yield within + name, value


def _differences(a: Checkpoint, b: Checkpoint) -> str:
    if a.asked is None or b.asked is None:
        return "what they were trained by cannot be read"
    return _told(a.asked, b.asked) or f"both are of seed {a.seed[-1]}, and their weights differ"


def _told(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs, by name."""
    names = [n for n in {**one, **other} if one.get(n, _NOTHING) != other.get(n, _NOTHING)]
    texts = [f"{n}: {one.get(n)} and {other.get(n)}" for n in names[:_SHOWN]]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "; ".join([*texts, *more])
