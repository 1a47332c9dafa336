"""One forward of a vision tower that prunes, and the hooks that look at nothing else.

Gradient checkpointing runs a block a second time in the backward pass, in another thread perhaps,
when the call is long over. So the forward goes from block to block as an argument of theirs, which
checkpointing keeps with the others; what a block did is in its `Step`, and done again.

U views of a call, T tokens of the tower, R rows that run, D width.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ocvtp.towers import taps
from ocvtp.towers.rows import Rows

RUN = "tower_run"
CARRIER = "ocvtp_tower_run"
"""The argument of blocks and of their attention that is the `TowerRun`."""


@dataclass
class Step:
    """What a block does.

    Args:
        rows: that it is given; None while all tokens run.
        num_merged: rows that it merges away.
        row_of: [U, R] the row that each of them goes to; None before they are matched, or if it
            merges none.
        merged: the rows behind that.
        keys: [U, R, D] of the block, on their way to be matched.
        mixed: [U, R - num_merged, D] what was merged, on its way past the MLP.
    """

    rows: Rows | None
    num_merged: int = 0
    row_of: Tensor | None = None
    merged: Rows | None = None
    keys: Tensor | None = None
    mixed: Tensor | None = None

    @property
    def left(self) -> Rows | None:
        """The rows that are left behind it."""
        return self.rows if self.merged is None else self.merged


class TowerRun:
    """One forward of a tower that prunes. No dataclass: wrappers take arguments that are, apart.

    Args:
        num_read: blocks that run before the last layer that is read.
    """

    def __init__(self, num_read: int) -> None:
        self.num_read = num_read
        self.grid_hw = (0, 0)
        """Of the patches."""
        self.rows: Rows | None = None
        """That run; None while all tokens do."""
        self.merges: tuple[int, ...] = ()
        """How many rows each block merges away; none where none does."""
        self.steps: dict[int, Step] = {}
        """Of the blocks that ran."""
        self.started = False
        """Whether the tower got its pixels."""


_IN_BLOCK: ContextVar[TowerRun | None] = ContextVar("ocvtp_in_block", default=None)


def running() -> TowerRun | None:
    """The forward that this thread is in."""
    record = taps.current()
    return None if record is None else record.other.get(RUN)


def hand_to_blocks(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """In front of all blocks."""
    run = running()
    return None if run is None else (args, kwargs | {CARRIER: run})


def attend(number: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """In front of a block's attention: take the forward over for the hooks that get no arguments.

    What is added to the logits of every row as a key goes to the attention.
    """
    run = kwargs.get(CARRIER)
    _IN_BLOCK.set(run if run is not None and run.merges else None)
    if run is None:
        return None
    kwargs = {name: value for name, value in kwargs.items() if name != CARRIER}
    rows = run.steps[number].rows
    if rows is not None and (bias := rows.bias()) is not None:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        kwargs["attention_mask"] = bias[:, None, None].to(states.dtype)
    return args, kwargs


def step_of(number: int) -> Step | None:
    """Of the block that this thread is in, between its attention and its end."""
    run = _IN_BLOCK.get()
    return None if run is None else run.steps[number]


def leave_block() -> None:
    """Behind the last hook in a block that asks for its step."""
    _IN_BLOCK.set(None)
