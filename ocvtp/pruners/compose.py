"""Pruners of different stages as one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import reduce
from operator import or_
from typing import Any

from ocvtp.lazy import bound
from ocvtp.pruners.base import Pruner
from ocvtp.pruners.budgets import Budget
from ocvtp.structures import STAGES, Needs


class Compose:
    """Pruners that act one after the other, each at its own stage.

    `Compose([build_pruner("fopru", num_keep=288), build_pruner("fastv", num_keep=144)])` keeps 288
    tokens before the language model and 144 of them inside it. What holds for a pruner holds for
    the whole: `with composed(model): ...`, `ocvtp.attach(model, composed)`.

    Args:
        pruners: at most one of each stage; the order does not matter, they run in that of the
            stages: pixels, encoder, llm_input, llm_layers.

    Raises:
        ValueError: if there is none, or two of one stage.
    """

    def __init__(self, pruners: Sequence[Pruner]) -> None:
        self._pruners = tuple(pruners)
        parts = [part for pruner in pruners for part in pruner.parts]
        self.parts: tuple[Pruner, ...] = tuple(sorted(parts, key=lambda p: STAGES.index(p.stage)))
        if not self.parts:
            raise ValueError("Compose got no pruners; pass at least one.")
        for first, second in zip(self.parts, self.parts[1:], strict=False):
            if first.stage == second.stage:
                raise ValueError(
                    f"Compose got {first.name!r} and {second.name!r}, which both act at stage"
                    f" {first.stage!r}; pass pruners of different stages, or Chain these two."
                )
        self.name = "+".join(part.name for part in self.parts)
        self.needs  # noqa: B018 - refuses what cannot be had together, now rather than later

    @property
    def needs(self) -> Needs:
        """What the host must supply for all of them before the language model runs."""
        return reduce(or_, (part.tower_needs for part in self.parts))

    @property
    def tower_needs(self) -> Needs:
        """`needs`, as of a single pruner."""
        return self.needs

    def with_budget(self, budget: Budget) -> Compose:
        """The same with another budget, if it is of one pruner.

        Raises:
            ValueError: if each of several has its own.
        """
        if len(self._pruners) > 1:
            raise ValueError(
                f"{self.name!r} is composed of {len(self._pruners)} pruners with a budget each, so"
                f" that {budget.said} cannot be that of all; attach one pruner to give it budgets"
                " call by call, or compose others for this budget."
            )
        return Compose([self._pruners[0].with_budget(budget)])

    def __call__(self, model: Any, **options: Any) -> AbstractContextManager[Any]:
        """`with composed(model): model.generate(...)`, see `ocvtp.attach`."""
        context: AbstractContextManager[Any] = bound("attached")(model, self, **options)
        return context

    def __repr__(self) -> str:
        return f"Compose({list(self.parts)!r})"
