"""How many tokens of an image stay in a server, and what one request may change of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ocvtp.field_types import shown
from ocvtp.pruners.budgets import BUDGETS, Budget, check_count

_EXAMPLE = '{"ocvtp": {"num_keep": 64}}'


def of_request(given: Any, own: Budget, most: int | None, spec: str) -> Budget:
    """The budget of a request.

    Args:
        given: what the request says under `ocvtp`; None if it says nothing.
        own: the engine's.
        most: tokens of an image that any request is given; None for all.
        spec: the engine's pruner: a request may name it, and no other.

    Raises:
        ValueError: for anything else than a budget, and for numbers that contradict each other.
    """
    if given is None:
        return own
    if not isinstance(given, Mapping):
        raise ValueError(f"the request has ocvtp={shown(given)}; pass a budget, e.g. {_EXAMPLE}.")
    changes = {key: value for key, value in given.items() if value is not None}
    if (named := changes.pop("pruner", spec)) != spec:
        raise ValueError(
            f"the request names pruner {shown(named)}, and this engine serves {spec!r}; leave"
            " the pruner out, or start another engine for it."
        )
    if others := sorted(map(str, changes.keys() - {*BUDGETS})):
        raise ValueError(
            f"the request has ocvtp settings {', '.join(others)}; a request may set"
            f" {', '.join(BUDGETS)}, all else is the engine's."
        )
    cap = changes.pop("max_keep", None)
    if changes:
        own = Budget(**changes).checked("the request")
    if cap is not None:
        cap = check_count("max_keep", cap)
        if "num_keep" in changes:
            check_cap(own, cap, "the request")
    return capped(capped(own, cap), most)


def capped(budget: Budget, most: int | None) -> Budget:
    """The same of at most so many tokens; None for any number."""
    if most is None:
        return budget
    if budget.num_keep is not None:
        return Budget(num_keep=min(budget.num_keep, most))
    return replace(budget, max_keep=most if budget.max_keep is None else min(budget.max_keep, most))


def check_cap(budget: Budget, most: int, who: str) -> None:
    """Refuse a number of tokens above the most that may stay.

    Args:
        budget: that was asked for. most: that came with it.
        who: got both, for messages.

    Raises:
        ValueError: that names the two.
    """
    if budget.num_keep is not None and budget.num_keep > most:
        raise ValueError(
            f"{who} got num_keep={budget.num_keep} and max_keep={most}, but max_keep is the most"
            f" tokens that an image may keep; pass num_keep={most} or fewer, or a larger max_keep."
        )
