"""Merging rows in the blocks of a vision tower, between attention and MLP.

U views of a call, R rows that a block is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocvtp.ops.bipartite import first_places, means
from ocvtp.pruners.block_merger import BlockMerger
from ocvtp.towers import taps
from ocvtp.towers.hooks import Hook, after, before
from ocvtp.towers.recordings import CALL
from ocvtp.towers.rows import Rows, Step


@dataclass(frozen=True)
class BlockMerging:
    """A merger in one tower.

    Args:
        merger: says which rows go together.
        look: gives the view of the tower, as it is now.
        num_prefix: tokens before the patches.
    """

    merger: BlockMerger
    look: Callable[[], taps.Tower]
    num_prefix: int

    def schedule(self, num_rows: int, num_read: int) -> tuple[int, ...]:
        """How many rows each block merges away, of `num_rows` that the first one is given."""
        counts = (num_rows - self.num_prefix, len(self.look().blocks), num_read)
        return self.merger.schedule(*counts)

    def hooks(self, number: int, block: Any) -> list[Hook]:
        """Hooks in a block between its halves, and at its end."""
        view = self.look()
        assert view.parts is not None
        parts, (_, key) = view.parts(block), view.query_key(block)
        return [
            after(key, partial(_keep_keys, number)),
            before(parts.norm, partial(self._merge, number)),
            after(parts.last, partial(_fill_up, number)),
        ]

    def _merge(self, number: int, module: Any, args: tuple[Tensor, ...]) -> Any:
        """Merge what the attention left, and let the MLP run on it."""
        step = _step(number)
        if step is None or not step.num_merged:
            return None
        states = args[0]
        rows = step.rows
        if rows is None:
            rows = Rows.all(len(states), states.shape[1], states.device)
        if step.row_of is None:
            step.row_of = self._match(step)
        sizes, num_rows = rows.sizes, states.shape[1] - step.num_merged
        if sizes is None:
            sizes = torch.ones_like(step.row_of, dtype=torch.float32)
        step.mixed, sizes = means(states, sizes, step.row_of, num_rows)
        if step.merged is None:
            places = first_places(rows.places, step.row_of, num_rows)
            step.merged = replace(rows, places=places, sizes=sizes)
        # The block will add these to what its MLP gives, which is of other rows: see `_fill_up`.
        states.zero_()
        return (step.mixed,)

    @torch.no_grad()
    def _match(self, step: Step) -> Tensor:
        """[U, R] the row that each goes to."""
        keys, step.keys = step.keys, None
        if keys is None:
            raise RuntimeError("the hook on the keys of a block did not fire: is it compiled?")
        # Only the last token before the patches takes part, as one that stays alone.
        apart = max(self.num_prefix - 1, 0)
        heads, has_prefix = self.look().num_heads, self.num_prefix > 0
        row_of = self.merger.rows(keys[:, apart:], heads, step.num_merged, has_prefix)
        alone = torch.arange(apart, device=row_of.device).expand(len(row_of), -1)
        return torch.cat([alone, row_of + apart], dim=1)


def _step(number: int) -> Step | None:
    """The step of the block that this thread is in, between its attention and its end."""
    call = CALL.get()
    return None if call is None or call.block_run is None else call.block_run.steps[number]


def _keep_keys(number: int, module: Any, args: Any, output: Tensor) -> None:
    """After the projection of a block's keys."""
    if (step := _step(number)) is not None and step.num_merged and step.row_of is None:
        step.keys = output.detach()


def _fill_up(number: int, module: Any, args: Any, output: Tensor) -> Tensor | None:
    """At the end of a block that merged: add its residual, which was emptied for that.

    Rows that were merged away become zeros, so that there are as many as the block expects.
    """
    step = _step(number)
    if step is not None and step.num_merged and step.mixed is None:
        return None  # the module ends both halves, and this was the first
    if (call := CALL.get()) is not None:  # the last to ask
        call.block_run = None
    if step is None or step.mixed is None:
        return None
    mixed, step.mixed = step.mixed, None
    return pad(mixed + output, (0, 0, 0, step.num_merged))
