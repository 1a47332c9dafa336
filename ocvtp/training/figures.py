"""Figures of a run that are the same on any number of devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed


def gathered(value: Any) -> list[Any]:
    """What every process of the run says, in the order of their ranks; all of them must ask."""
    if not is_shared():
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def is_shared() -> bool:
    """Whether the run has several processes."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


class Figures:
    """Means of named figures over all images that they are of, in all batches and processes.

    A process may have had figures that others had not, or none at all.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: list[Tensor] = []

    def add(self, values: Mapping[str, Tensor | float], count: int) -> None:
        """Means over `count` images."""
        for name, value in values.items():
            mean = torch.as_tensor(value).detach().double()
            self.add_sum(name, mean * count, count)

    def add_sum(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """The sum of a figure over `count` images; 0 of them are fine."""
        self._names.append(name)
        total = total.detach().double()
        self._sums.append(torch.stack([total, torch.as_tensor(count).to(total)]))

    def pooled(self) -> dict[str, float]:
        """The means, NaN of no images; empties what was added. All processes must call it."""
        own: dict[str, tuple[float, float]] = {}
        device = next((one.device for one in self._sums if one.device.type != "cpu"), None)
        pairs = torch.stack([one.to(device) for one in self._sums]).tolist() if self._sums else []
        for name, (total, count) in zip(self._names, pairs, strict=True):
            own[name] = _plus(own.get(name, (0.0, 0.0)), (total, count))
        self._names, self._sums = [], []
        found: dict[str, tuple[float, float]] = {}
        for theirs in gathered(own):
            for name, pair in theirs.items():
                found[name] = _plus(found.get(name, (0.0, 0.0)), pair)
        return {
            name: total / count if count else float("nan") for name, (total, count) in found.items()
        }


def _plus(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def share_of_gradient(count: int, device: torch.device) -> Tensor | float:
    """What a process's mean over its `count` images is multiplied by.

    Gradients of processes are averaged as if they had as many images each; with this they are the
    gradient of the mean over all images of the step. All processes must call it.
    """
    if not is_shared():
        return 1.0
    total = torch.tensor(float(count), device=device)
    distributed.all_reduce(total)
    return count * distributed.get_world_size() / total.clamp(min=1)
