"""A call of the bare model and the same call under a pruner that keeps all: what must be equal.

An argument set is a function that makes the keyword arguments of one call, new ones every time, as
processors, streamers and caches have a state. Positional arguments are under `ARGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from reference import Inputs, Side
from torch import Tensor

from matrix.families import BATCH, Family, Row
from ocvtp import Pruner, build_pruner

ARGS = "*"
PRUNERS: dict[str, Callable[[], Pruner]] = {
    "none": lambda: build_pruner("none"),
    "fopru": lambda: build_pruner("fopru", keep_ratio=1.0),
}
"""The second one reads the tower's attention."""


@dataclass
class Call:
    """One call in the making.

    Args:
        family: of the model.
        model: that is called; argument sets that change it take a copy first.
        seen: what the caller's objects are shown in the course of the call.
    """

    family: Family
    model: Any
    seen: list[Any] = field(default_factory=list)

    def copy(self) -> Any:
        """Call a copy of the model, which may be changed."""
        self.model = deepcopy(self.model)
        return self.model

    def inputs(self, rows: Sequence[Row] = BATCH, side: Side = "left") -> Inputs:
        """What the processor returns, of images whose tokens the model reads as they are."""
        return dict((self.family.make_unresized or self.family.make)(rows, side))

    def alone(self, row: int = 0) -> Inputs:
        """One row of the batch."""
        return self.family.single(self.inputs(), row)


Make = Callable[[Call], Inputs]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One argument set.

    Args:
        make: makes it.
        then: makes that of a second call, of what the first one returned; None if there is none.
        around: what the calls run in.
        refused: what the one error says, of a set that is not to be had under a pruner.
        remedy: what to do instead, for the page.
        raises: what the bare model says on some hosts; None if it never raises.
        since: the version of transformers before which the bare model itself is wrong.
        slow: whether it is left to the slow tests.
    """

    make: Make
    then: Callable[[Call, Any], Inputs] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    refused: str | None = None
    remedy: str | None = None
    raises: str | None = None
    since: tuple[int, int] = (5, 17)
    slow: bool = False


@dataclass
class Table:
    """Argument sets of one method of a model, by what they are called.

    Args:
        method: `generate` or `forward`.
    """

    method: str
    entries: dict[str, Entry] = field(default_factory=dict)

    def __call__(self, title: str, **settings: Any) -> Callable[[Make], Make]:
        """Add what the decorated function makes."""

        def add(make: Make) -> Make:
            assert title not in self.entries
            self.entries[title] = Entry(make=make, **settings)
            return make

        return add


@torch.no_grad()
def outcome(family: Family, table: Table, title: str, pruner: str | None) -> Any:
    """What the calls return or raise, and what their caller's objects saw.

    Args:
        family: of the model.
        table: of the method.
        title: of the argument set.
        pruner: of `PRUNERS`; None for the bare model.
    """
    call, entry, results = Call(family, family.model), table.entries[title], list[Any]()
    if hasattr(call.model.model, "rope_deltas"):
        call.model.model.rope_deltas = None  # of the last call, which may be read
    arguments = entry.make(call)
    call.seen.clear()
    torch.manual_seed(3)
    with PRUNERS[pruner]()(call.model) if pruner else nullcontext(), entry.around():
        try:
            results.append(run(call.model, table.method, arguments))
            if entry.then is not None:
                arguments = entry.then(call, results[0])
                results.append(run(call.model, table.method, arguments))
        except Exception as error:  # the same one is expected of both
            results.append(error)
    return results, call.seen


def run(model: Any, method: str, arguments: Inputs) -> Any:
    positional = arguments.pop(ARGS, ())
    return getattr(model, method)(*positional, **arguments)


def error_in(found: Any) -> Exception | None:
    """What was raised."""
    last = found[0][-1]
    return last if isinstance(last, Exception) else None


OF_IMAGES = ("image_hidden_states", "image_outputs")
"""What an output says of the images: of a tower that was cut, the last states are not there."""

OF_THE_MODEL = ("rope_deltas",)
"""Which older models keep, and hand back though a call has not set it."""


def differences(one: Any, other: Any, path: str = "", left_out: Sequence[str] = ()) -> list[str]:
    """Where two results are not the same bit for bit, fields that are left out apart."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        same = type(one) is type(other) and str(one) == str(other)
        return [] if same else [f"{path}: {one!r} and {other!r}"]
    if type(one) is not type(other):
        return [f"{path}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return [f"{path}: {list(one.shape)} {one.dtype} and {list(other.shape)} {other.dtype}"]
        same = torch.equal(one.nan_to_num(), other.nan_to_num())
        return [] if same else [f"{path}: other numbers"]
    if isinstance(one, dict):
        one, other = ({k: v for k, v in d.items() if k not in left_out} for d in (one, other))
        if list(one) != list(other):
            return [f"{path}: {list(one)} and {list(other)}"]
        pairs = [(f"{path}.{name}", one[name], other[name]) for name in one]
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} of them"]
        pairs = [(f"{path}[{i}]", *both) for i, both in enumerate(zip(one, other, strict=True))]
    elif hasattr(one, "get_seq_length"):
        pairs = [(f"{path}.layers", _layers(one), _layers(other))]
    else:
        return [] if one == other else [f"{path}: {one!r} and {other!r}"]
    return [found for name, *both in pairs for found in differences(*both, name, left_out)]


def _layers(cache: Any) -> list[Any]:
    """Lengths, keys and values of a cache's layers."""
    held = [(layer.get_seq_length(), layer.keys, layer.values) for layer in cache.layers]
    return [tuple(int(x) if not torch.is_tensor(x) or not x.ndim else x for x in h) for h in held]


def refusals(table: Table) -> str:
    """The rows of the page's table: what is refused under a pruner, and what to do."""
    rows = [
        f"| `{table.method}` | {title} | {entry.remedy} |"
        for title, entry in table.entries.items()
        if entry.refused is not None
    ]
    return "\n".join(rows)
