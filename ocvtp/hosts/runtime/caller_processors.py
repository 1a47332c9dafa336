"""Logits processors and stopping criteria of the caller of generate() read the caller's prompt.

generate() puts them among its own, where each replaces the one of its class: these are the caller's
objects themselves. Its own were made for the short prompt, and read that.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from ocvtp.hosts.runtime.call import Call
from ocvtp.hosts.wrap_methods import Original, Wrapped, has_methods
from ocvtp.towers.recordings import CALL
from ocvtp.transformers_names import MERGE_PROCESSORS


def merge(model: Any, original: Original, default_list: Any, custom_list: Any) -> Any:
    """How generate() joins its own processors (or criteria) with those that it is given."""
    merged, call = original(default_list, custom_list), CALL.get()
    if not isinstance(call, Call) or call.callers is None:
        return merged
    callers = call.callers
    callers.find([*default_list, *custom_list])
    if not any(map(callers.has, merged)):
        return merged
    from transformers import StoppingCriteriaList

    from ocvtp.hosts.runtime.processor_lists import CriteriaOfCallers, ProcessorsOfCallers

    is_criteria = isinstance(merged, StoppingCriteriaList)
    kind = CriteriaOfCallers if is_criteria else ProcessorsOfCallers
    return kind(merged, callers.shown, callers.has)


def with_assistant(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Let the caller's processors read the same where an assistant drafts with them.

    An assistant with another tokenizer has a prompt of its own; one that has a pruner does this
    itself.
    """
    assistant = kwargs.get("assistant_model")
    if not hasattr(type(assistant), MERGE_PROCESSORS) or has_methods(assistant):
        return kwargs
    if kwargs.get("assistant_tokenizer") is not None:
        return kwargs
    assistant = copy(assistant)  # the same modules; the caller's stays as it is
    Wrapped(merge, assistant, name=MERGE_PROCESSORS)
    return kwargs | {"assistant_model": assistant}
