"""What hooks in a vision tower leave behind while one forward of it runs, in this thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ocvtp.towers.rows import Rows


@dataclass
class Recording:
    """What one forward of the tower left behind; keys are the resolved, non-negative numbers."""

    hidden: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, T, D]
    queries: dict[int, Tensor] = field(default_factory=dict)  # block -> [B, T, D]
    keys: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Rows] = field(default_factory=dict)  # block -> what it ran, where not all
    other: dict[str, Any] = field(default_factory=dict)
    has_graph: bool = field(default_factory=torch.is_grad_enabled)
    """Whether the forward began with one."""
    lost_graph: bool = False
    """Whether something was recorded without it nevertheless."""

    def put(self, store: dict[Any, Any], name: Any, value: Any) -> None:
        """Record a value in one of the dictionaries."""
        store[name] = value
        self.lost_graph |= self.has_graph and not torch.is_grad_enabled()

    def guard(self) -> None:
        """Refuse gradients of what was recorded without a graph."""
        for store in (self.hidden, self.queries, self.keys, self.other):
            values: dict[Any, Any] = store
            for name, value in values.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    values[name] = value if value.requires_grad else _guarded(value)


def _guarded(value: Tensor) -> Tensor:
    value = value.detach().requires_grad_()
    value.register_hook(_refuse)
    return value


def _refuse(gradient: Tensor) -> None:
    raise ValueError(
        "the pruner mixes tokens by weights that depend on keys or attention in the vision tower,"
        " which is under training, and reentrant gradient checkpointing loses their gradients;"
        " pass use_reentrant=False among the checkpointing arguments, or freeze the vision tower."
    )


_RECORDING: ContextVar[Recording | None] = ContextVar("ocvtp_recording", default=None)


@contextmanager
def recording(tower: nn.Module | None = None) -> Iterator[Recording]:
    """Record every tapped tower that runs inside the block, in this thread.

    Args:
        tower: that may be under training. Reentrant gradient checkpointing runs its blocks without
            a graph, the first time: a backward pass that needs one for what was recorded there is
            refused.
    """
    record = Recording()
    token = _RECORDING.set(record)
    try:
        yield record
    finally:
        _RECORDING.reset(token)
    trains = tower is not None and any(weight.requires_grad for weight in tower.parameters())
    if record.lost_graph and trains:
        record.guard()


def current() -> Recording | None:
    """The recording that this thread is in."""
    return _RECORDING.get()
