"""Later turns: prompts that continue a cache which was filled with a short prompt.

L tokens of the caller's first prompt, L' of the short one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.base import Host
from ocvtp.hosts.cache_notes import PromptNote, leave_note, notes_on
from ocvtp.hosts.prompt.checks import USE_GENERATE, check_mask
from ocvtp.hosts.prompt.columns import continue_positions
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.runtime.call_budgets import CallBudgets
from ocvtp.hosts.runtime.generate_arguments import Shown, given_or_inferred_mask
from ocvtp.transformers_names import cache_in, cache_length, cache_of


def remember(output: Any, kwargs: dict[str, Any], prompt: Prompt) -> None:
    """Leave a note of the prompt on the caches that a call filled, for the next turn."""
    note = PromptNote(
        prompt.input_ids,
        prompt.images["pixel_values"],
        prompt.short_ids,
        prompt.short_mask,
        prompt.positions,
        prompt.rope_deltas,
    )
    for cache in (cache_of(output), cache_in(kwargs)):
        if cache is not None and not isinstance(cache, tuple):
            leave_note(cache, prompt=note)


def remembered_prompt(cache: Any, has_images: bool) -> PromptNote | None:
    """The prompt that the given cache was filled with under a pruner.

    Args:
        cache: of a generate(), None without one.
        has_images: whether `pixel_values` come with it.

    Raises:
        ValueError: if images come with a cache that was filled without one.
    """
    if cache is None:
        return None
    if not cache.get_seq_length():  # it may be emptied
        leave_note(cache, prompt=None)
        return None
    found = notes_on(cache).prompt
    if found is None and has_images:
        raise ValueError(
            "generate() got images and a cache that was filled without the pruner; pass an empty"
            " cache, or the one that a pruned generate() filled."
        )
    return found


def refuse_budgets(budgets: CallBudgets | None, kwargs: dict[str, Any]) -> None:
    """Refuse a budget that comes with a later turn.

    Args:
        budgets: what the call says. kwargs: its arguments.

    Raises:
        ValueError: if it says one, and its cache holds a prompt whose images were pruned.
    """
    if budgets is None or not cache_length(kwargs):
        return
    if notes_on(cache_in(kwargs)).prompt is not None:
        raise ValueError(
            f"{budgets.said} comes with a cache whose images were pruned when they were read; pass"
            " it with the turn that brings the images, or leave it out."
        )


def later_turn(
    host: Host, first: PromptNote, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Shown]:
    """Arguments of a later turn on a warm cache, and what the caller is shown of its prompt.

    Raises:
        ValueError: if the prompt does not continue the one in the cache, or brings new images.
    """
    tail = _new_part(host, first, kwargs)
    dropped = (*host.image_keys, "mm_token_type_ids")  # only text follows
    turn = {k: v for k, v in kwargs.items() if k not in dropped}
    turn["input_ids"] = torch.cat([first.short_ids.to(tail.device), tail], dim=1)
    if turn["input_ids"].shape[1] <= cache_length(kwargs):
        raise ValueError(
            "input_ids hold nothing that is not in the cache already; pass the whole conversation"
            " with the new turn at its end, or an empty cache."
        )
    mask = given_or_inferred_mask(host.model, kwargs)
    rest = torch.ones_like(tail)
    if mask is not None:
        check_mask(mask, kwargs["input_ids"])
        rest = mask[:, first.input_ids.shape[1] :].to(tail.device)
    head = first.short_mask.to(rest.device, rest.dtype)
    turn["attention_mask"] = torch.cat([head, rest], dim=1)
    if first.positions is not None and kwargs.get("position_ids") is None:
        turn["position_ids"] = continue_positions(
            first.positions.to(tail.device),
            None if first.rope_deltas is None else first.rope_deltas.to(tail.device),
            first.short_mask.to(tail.device),
            rest,
        )
    return turn, Shown(kwargs["input_ids"], turn["input_ids"].shape[1])


def _new_part(host: Host, first: PromptNote, kwargs: dict[str, Any]) -> Tensor:
    """The ids after the prompt in the cache."""
    ids: Tensor | None = kwargs.get("input_ids")
    if ids is None:
        raise ValueError(
            "this cache was filled under a pruner; to continue it, pass the whole conversation as"
            " input_ids."
        )
    start = first.input_ids.to(ids.device)
    length = start.shape[1]
    if ids.shape[0] != start.shape[0] or not torch.equal(ids[:, :length], start):
        raise ValueError(
            f"input_ids {list(ids.shape)} do not begin with the prompt {list(start.shape)} that the"
            " cache was filled with; pass the whole conversation, or an empty cache."
        )
    if cache_length(kwargs) < first.short_ids.shape[1]:
        raise ValueError(
            "the cache was cropped into the prompt that it was filled with; pass the whole"
            " conversation with its images and an empty cache."
        )
    images = kwargs.get("pixel_values")
    old = first.pixel_values
    is_new = images is not None and (
        images.shape != old.shape or not torch.equal(images.to(old.device, old.dtype), old)
    )
    if is_new or bool((ids[:, length:] == host.image_token_id).any()):
        raise ValueError(
            "a later turn brings new images, which a warm cache cannot take; pass the whole"
            " conversation with all its images and an empty cache."
        )
    return ids[:, length:]


def next_step(kwargs: dict[str, Any], ids: Tensor | None) -> dict[str, Any]:
    """Arguments of a bare forward() on a cache, with the coordinates that follow a short prompt.

    Raises:
        ValueError: for a mask of the caller's length, or gapped positions without position_ids.
    """
    first = notes_on(cache_in(kwargs)).prompt
    if first is None or ids is None:
        return kwargs
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        mask = None
    elif mask.shape[1] > (length := cache_length(kwargs) + ids.shape[1]):
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but the cache, whose prompt was pruned,"
            f" and input_ids have {length}; extend the short prompt's mask (`on_prune` hands it"
            f" over), or use generate(). {USE_GENERATE}"
        )
    if first.positions is None or kwargs.get("position_ids") is not None:
        return kwargs
    if first.rope_deltas is None:
        raise ValueError(
            "the prompt in this cache has gaps in its positions; pass position_ids (the next is"
            f" {(first.positions.amax(dim=1) + 1).tolist()} after the prompt), or use generate()."
        )
    steps = torch.arange(ids.shape[1], device=ids.device)
    padding = (~first.short_mask).sum(dim=1, keepdim=True).to(ids.device)
    columns = cache_length(kwargs) - padding + steps  # [B, n]
    if mask is not None:
        columns = mask.long().cumsum(dim=1)[:, -len(steps) :].to(ids.device) - 1
    coordinates = columns + first.rope_deltas.to(ids.device)
    rows = [columns, *[coordinates] * (len(first.positions) - 1)]
    return kwargs | {"position_ids": torch.stack(rows)}
