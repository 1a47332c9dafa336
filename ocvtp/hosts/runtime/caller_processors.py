"""Logits processors and stopping criteria of the caller of generate() read the caller's prompt.

generate() puts them among its own, where they replace those of their class: it is handed the
caller's objects themselves. Its own were made for the short prompt, and read that.

B rows of the batch, L tokens of the caller's prompt, L' of the short one, V tokens that there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from ocvtp.hosts.runtime.generate_arguments import Shown
from ocvtp.hosts.wrap_methods import Original, Wrapped, has_methods
from ocvtp.transformers_names import MERGE_PROCESSORS


@dataclass
class Callers:
    """What a caller handed over.

    Args:
        items: processors and criteria, and the function of a constraint.
        shown: the prompt that they read.
        waiting: those that generate() has not put among its own yet.
    """

    items: list[Any]
    shown: Shown
    waiting: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = list(self.items)

    def has(self, item: Any) -> bool:
        """Whether a processor or criterion is the caller's, or asks a function of the caller's."""
        return any(_is_of(item, own) for own in self.items)

    def find(self, items: list[Any]) -> None:
        """Note which of them generate() has."""
        self.waiting = [own for own in self.waiting if not any(_is_of(item, own) for item in items)]


def _is_of(item: Any, own: Any) -> bool:
    held = vars(item).values() if hasattr(item, "__dict__") else ()
    return item is own or any(part is own for part in held)


_CALLERS: ContextVar[Callers | None] = ContextVar("ocvtp_callers", default=None)


@contextmanager
def reading(kwargs: dict[str, Any], shown: Shown) -> Iterator[dict[str, Any]]:
    """Show what reads the prompt the caller's, while generate() runs inside the block.

    Args:
        kwargs: of generate().
        shown: the prompt.

    Returns:
        what to hand generate() instead.

    Raises:
        ValueError: if generate() has used them in a way that is not known.
    """
    lists = (kwargs.get("logits_processor"), kwargs.get("stopping_criteria"))
    items = [item for some in lists if isinstance(some, (list, tuple)) for item in some]
    if (constraint := kwargs.get("prefix_allowed_tokens_fn")) is not None:
        items.append(constraint)
    callers = Callers(items, shown)
    token = _CALLERS.set(callers if items else None)
    try:
        yield _with_assistant(kwargs) if items else kwargs
    finally:
        _CALLERS.reset(token)
    if callers.waiting:
        names = ", ".join(getattr(one, "__name__", type(one).__name__) for one in callers.waiting)
        raise ValueError(
            f"generate() did not put {names} among its own processors and criteria, so that they"
            " may have read another prompt than yours; leave them out while a pruner is attached."
        )


def merge(model: Any, original: Original, default_list: Any, custom_list: Any) -> Any:
    """What generate() makes of its own processors (or criteria) and of those that it is given."""
    merged, callers = original(default_list, custom_list), _CALLERS.get()
    if callers is None:
        return merged
    callers.find([*default_list, *custom_list])
    if not any(map(callers.has, merged)):
        return merged
    from transformers import StoppingCriteriaList

    from ocvtp.hosts.runtime.processor_lists import CriteriaOfCallers, ProcessorsOfCallers

    is_criteria = isinstance(merged, StoppingCriteriaList)
    kind = CriteriaOfCallers if is_criteria else ProcessorsOfCallers
    return kind(merged, callers.shown, callers.has)


def _with_assistant(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Let the caller's processors read the same where an assistant drafts with them.

    An assistant with another tokenizer has a prompt of its own. What has a pruner sees to it.
    """
    assistant = kwargs.get("assistant_model")
    if not hasattr(type(assistant), MERGE_PROCESSORS) or has_methods(assistant):
        return kwargs
    if kwargs.get("assistant_tokenizer") is not None:
        return kwargs
    assistant = copy(assistant)  # the same modules; the caller's stays as it is
    Wrapped(merge, assistant, name=MERGE_PROCESSORS)
    return kwargs | {"assistant_model": assistant}
