"""Budgets of single calls: `model.generate(**inputs, num_keep=64)`, or one for every row.

An attached pruner has a budget; a call may say another one, and so may a `with` block around calls
of its thread. What a call says is checked in every call, whether it brings images or not; in one of
text alone it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ocvtp.pruners.budgets import BUDGETS, Budget
from ocvtp.towers.recordings import CALL, TowerCall


@dataclass(frozen=True)
class CallBudgets:
    """What a call says of its budget.

    Args:
        said: as the caller wrote it, for messages.
        budgets: one for all rows, or one for each, None where that of the attached pruner holds.
        by_row: whether there is one for each.
    """

    said: str
    budgets: tuple[Budget | None, ...]
    by_row: bool = False

    @classmethod
    def of(cls, budget: Budget) -> CallBudgets:
        """One for all rows."""
        return cls(budget.said, (budget.checked("this block"),))

    def of_rows(self, rows: int) -> tuple[Budget | None, ...]:
        """Of every row, or one for all.

        Raises:
            ValueError: if there are more or fewer than rows.
        """
        if self.by_row and (given := len(self.budgets)) != rows:
            raise ValueError(
                f"{self.said} has {given} value{'s' * (given != 1)} for {rows}"
                f" prompt{'s' * (rows != 1)}; pass one number for all, or one for each row of"
                " input_ids (its images, beams and returned sequences share it)."
            )
        return self.budgets


def take_budgets(
    kwargs: dict[str, Any], check: Callable[[Budget | None], object]
) -> tuple[dict[str, Any], CallBudgets | None]:
    """Arguments of generate() or forward() without budgets, which transformers does not know.

    Args:
        kwargs: of the call. check: refuses a budget that the attached pruner cannot have.

    Returns:
        the others, and what they say; None where none is given.

    Raises:
        ValueError: for what is no budget, where there is not one for every row, and what `check`
            refuses.
    """
    if all(name not in kwargs for name in BUDGETS):
        return kwargs, None
    given = {name: _plain(kwargs[name]) for name in BUDGETS if kwargs.get(name) is not None}
    kwargs = {name: value for name, value in kwargs.items() if name not in BUDGETS}
    if not given:
        return kwargs, None
    said = ", ".join(f"{name}={value!r}" for name, value in given.items())
    lengths = {len(value) for value in given.values() if isinstance(value, list)}
    if len(lengths) > 1:
        raise ValueError(f"{said}: lists of different lengths; pass one value for each row in all.")
    rows = lengths.pop() if lengths else 1
    lists = {k: v if isinstance(v, list) else [v] * rows for k, v in given.items()}
    found = []
    for row in range(rows):
        budget = Budget(**{name: values[row] for name, values in lists.items()})
        found.append(budget.checked("a call") if budget.settings() else None)
    budgets = CallBudgets(said, tuple(found), any(isinstance(v, list) for v in given.values()))
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(prompts := kwargs.get(name), Tensor):
            budgets.of_rows(len(prompts))
    for one in dict.fromkeys(found):
        check(one)
    return kwargs, budgets


def _plain(value: Any) -> Any:
    """A tensor, array or tuple as a list or a number; everything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


@dataclass(kw_only=True)
class BudgetBlock(TowerCall):
    """A block around calls that have another budget.

    Args:
        attachment: of the model that they are calls of. budgets: that they have.
    """

    attachment: object = field(repr=False)
    budgets: CallBudgets


@contextmanager
def inside_block(attachment: object, budgets: CallBudgets) -> Iterator[None]:
    """Inside the block, calls of this thread under an attached pruner have these budgets."""
    token = CALL.set(BudgetBlock(attachment=attachment, budgets=budgets, around=CALL.get()))
    try:
        yield
    finally:
        CALL.reset(token)


def of_block(attachment: object) -> CallBudgets | None:
    """Those of the innermost block that this thread is in; None outside of any."""
    call = CALL.get()
    while call is not None:
        if isinstance(call, BudgetBlock) and call.attachment is attachment:
            return call.budgets
        call = call.around
    return None
