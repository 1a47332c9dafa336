"""What one call hands to the hooks in a vision tower, and what these record.

T tokens of the tower, P patches of all images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ocvtp.towers.rows import Rows, TowerRun


@dataclass
class Recording:
    """One forward of a tower; keys are the resolved, non-negative numbers of layers and blocks.

    Args:
        first_unread: the half of a block from which on nothing need run; None if all must.
        projected_width: of the zeros in the place of the projector's output; None if it runs.
        run: the rows that run, where pruners act inside of the tower.
    """

    first_unread: int | None = None
    projected_width: int | None = None
    run: TowerRun | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, T, D]
    queries: dict[int, Tensor] = field(default_factory=dict)  # block -> [B, T, D]
    keys: dict[int, Tensor] = field(default_factory=dict)
    fused: dict[int, Tensor] = field(default_factory=dict)  # block -> [P, 3 D], with the values
    turns: dict[int, Any] = field(default_factory=dict)  # block -> how far its heads are turned
    segment_ends: dict[int, Tensor] = field(default_factory=dict)  # block -> among the P
    rows: dict[int, Rows] = field(default_factory=dict)  # block -> what it ran, where not all
    features: Tensor | None = None
    """What the projector was given."""
    normed: Tensor | None = None
    """What the norm after the last block gave."""
    is_cut: bool = False
    """Whether anything did not run."""
    is_projected_later: bool = False
    """Whether zeros are in the place of the projector's output."""
    has_graph: bool = field(default_factory=torch.is_grad_enabled)
    """Whether the forward began with one."""
    lost_graph: bool = False
    """Whether something was recorded without it all the same."""

    def seen(self, value: Any) -> Any:
        """Return a value that is recorded, and note whether it lost its graph."""
        self.lost_graph |= self.has_graph and not torch.is_grad_enabled()
        return value

    def guard(self) -> None:
        """Refuse gradients of what was recorded without a graph."""
        stores: list[dict[int, Tensor]] = [self.hidden, self.queries, self.keys, self.fused]
        for store in stores:
            for number, value in store.items():
                store[number] = _guarded(value)
        if self.features is not None:
            self.features = _guarded(self.features)
        if self.normed is not None:
            self.normed = _guarded(self.normed)


def _guarded(value: Tensor) -> Tensor:
    if value.requires_grad or not value.is_floating_point():
        return value
    value = value.detach().requires_grad_()
    value.register_hook(_refuse)
    return value


def _refuse(gradient: Tensor) -> None:
    raise ValueError(
        "the pruner mixes tokens by weights that depend on keys or attention in the vision tower,"
        " which is under training, and reentrant gradient checkpointing loses their gradients;"
        " pass use_reentrant=False among the checkpointing arguments, or freeze the vision tower."
    )


@dataclass
class TowerCall:
    """The part of a call that hooks in a vision tower know.

    Attributes:
        recording: the current forward of the tower.
        block_run: the run of the block that this thread is in, between its attention and its end.
        around: the call that this one is inside of; None if it is the outermost.
    """

    recording: Recording | None = field(default=None, kw_only=True)
    block_run: TowerRun | None = field(default=None, kw_only=True)
    around: TowerCall | None = field(default=None, kw_only=True, repr=False)


CALL: ContextVar[TowerCall | None] = ContextVar("ocvtp_call", default=None)
"""The call that this thread is in: the one place where hooks find out what to do. Encoders
have a `TowerCall`, the language model's hooks a `LayerCall`, an attached model a `Call`."""


@contextmanager
def recording(tower: nn.Module | None = None) -> Iterator[Recording]:
    """Record every tapped tower that runs inside the block, in this thread.

    Args:
        tower: one that may be in training. Reentrant gradient checkpointing runs its blocks without
            a graph, the first time: a backward pass that needs one for what was recorded there is
            refused.
    """
    record = Recording()
    token = CALL.set(TowerCall(recording=record, around=CALL.get()))
    try:
        yield record
    finally:
        CALL.reset(token)
    trains = tower is not None and any(weight.requires_grad for weight in tower.parameters())
    if record.lost_graph and trains:
        record.guard()


@contextmanager
def outside() -> Iterator[None]:
    """Inside the block this thread is in no call, so that hooks find nothing to do."""
    token = CALL.set(None)
    try:
        yield
    finally:
        CALL.reset(token)


def current() -> Recording | None:
    """The recording that this thread is in."""
    call = CALL.get()
    return None if call is None else call.recording


def keep_features(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Before a projector: what it is given."""
    if (record := current()) is not None:
        record.features = record.seen(args[0])


def keep_normed(module: nn.Module, args: Any, output: Any) -> None:
    """After the norm that follows the last block: what it gave."""
    if (record := current()) is not None:
        record.normed = record.seen(output)


def keep_turn(
    number: int, argument: str, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    """Before the attention of block `number`: the argument that says how far heads are turned."""
    if (record := current()) is not None:
        record.turns[number] = kwargs[argument]


def keep_segments(number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before the attention of block `number`: the rotations and the segments of its patches."""
    if (record := current()) is not None:
        record.turns[number] = kwargs["position_embeddings"]
        record.segment_ends[number] = kwargs["cu_seqlens"]


def keep_output(store: str, number: int, module: nn.Module, args: Any, output: Any) -> None:
    """After a module: its output, in the `store` of that name, under a number."""
    if (record := current()) is not None:
        value = output[0] if isinstance(output, tuple) else output
        getattr(record, store)[number] = record.seen(value)


def keep_input(number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before the first block: the hidden states, under the number of a layer."""
    if (record := current()) is not None:
        record.hidden[number] = record.seen(args[0] if args else kwargs["hidden_states"])
