"""One forward of a vision tower that prunes, and the hooks that look at nothing else.

U views of a call, T tokens of the tower, R rows that run, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ocvtp.encoders import taps
from ocvtp.encoders.rows import Rows

RUN = "tower_run"


@dataclass
class TowerRun:
    """One forward of a tower that prunes.

    Args:
        num_read: blocks that run before the last layer that is read.
        grid_hw: of the patches.
        rows: that run; None while all tokens do.
        merges: how many rows each block merges away; None where none does.
        keys: of the block that runs, if it merges. merged: its rows behind that.
        started: whether the tower got its pixels.
    """

    num_read: int
    grid_hw: tuple[int, int] = (0, 0)
    rows: Rows | None = None
    merges: tuple[int, ...] | None = None
    keys: Tensor | None = None
    merged: Tensor | None = None
    started: bool = False


def running() -> TowerRun | None:
    """The forward that this thread is in."""
    record = taps.current()
    return None if record is None else record.other.get(RUN)


def mask_rows(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """In front of attention: what is added to the logits of every row as a key."""
    if (run := running()) is None or run.rows is None or (bias := run.rows.bias()) is None:
        return None
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"attention_mask": bias[:, None, None].to(states.dtype)}


def keep_keys(module: Any, args: Any, output: Tensor) -> None:
    """Behind the projection of a block's keys."""
    if (run := running()) is not None:
        run.keys = output


def add_residual(module: Any, args: Any, output: Tensor) -> Tensor | None:
    """Behind the MLP of a block that merged, whose own residual has the rows from before."""
    if (run := running()) is None or run.merged is None:
        return None
    run.merged = run.merged + output
    return output.new_zeros(1)
