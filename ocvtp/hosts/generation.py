"""generate() on a short prompt that looks to its caller like generate() on the whole one.

B rows of the batch, L tokens of the caller's prompt, L' of the short one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.base import Host
from ocvtp.hosts.rewrite import Prompt

_ON_CACHE = "_ocvtp_prompt"


@dataclass(frozen=True)
class Shown:
    """What the caller is shown in place of the short prompt.

    Args:
        input_ids: [B, L] the caller's prompt.
        short_length: L'.
    """

    input_ids: Tensor
    short_length: int

    def lengthen(self, sequences: Tensor) -> Tensor:
        """Swap the short prompt at the front of [B * beams, L' + n] for the caller's."""
        ids = self.input_ids.to(sequences.device)
        ids = ids.repeat_interleave(sequences.shape[0] // ids.shape[0], dim=0)
        return torch.cat([ids, sequences[:, self.short_length :]], dim=1)


@dataclass(frozen=True)
class _Remembered:
    """What a cache remembers of the prompt that it was filled with.

    Args:
        input_ids: [B, L] the caller's. short_ids: [B, L']. short_mask: [B, L'] bool.
    """

    input_ids: Tensor
    short_ids: Tensor
    short_mask: Tensor


def cache_length(kwargs: dict[str, Any]) -> int:
    """Tokens in the cache that a call was given."""
    cache = kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0


def remembered_prompt(kwargs: dict[str, Any]) -> _Remembered | None:
    """The prompt that the given cache was filled with under a pruner.

    Raises:
        ValueError: if images come with a cache that was filled without one.
    """
    if not cache_length(kwargs):
        return None
    found: _Remembered | None = getattr(kwargs["past_key_values"], _ON_CACHE, None)
    if found is None and kwargs.get("pixel_values") is not None:
        raise ValueError(
            "generate() got images and a cache that was filled without the pruner; pass an empty"
            " cache, or the one that a pruned generate() filled."
        )
    return found


def remember(output: Any, kwargs: dict[str, Any], prompt: Prompt | _Remembered | None) -> None:
    """Leave a note of the prompt on the cache, for the next turn."""
    if prompt is None:
        return
    note = _Remembered(prompt.input_ids, prompt.short_ids, prompt.short_mask)
    for cache in (getattr(output, "past_key_values", None), kwargs.get("past_key_values")):
        if cache is not None and not isinstance(cache, tuple):
            setattr(cache, _ON_CACHE, note)


def later_turn(
    host: Host, first: _Remembered, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a later turn on a warm cache, and the caller's whole prompt [B, L].

    Raises:
        ValueError: if the prompt does not continue the one in the cache, or brings new images.
    """
    ids: Tensor = kwargs["input_ids"]
    length = first.input_ids.shape[1]
    start = first.input_ids.to(ids.device)
    if ids.shape[0] != start.shape[0] or not torch.equal(ids[:, :length], start):
        raise ValueError(
            f"input_ids {list(ids.shape)} do not begin with the prompt {list(start.shape)} that the"
            " cache was filled with; pass the whole conversation, or an empty cache."
        )
    tail = ids[:, length:]
    if bool((tail == host.image_token_id).any()):
        raise ValueError(
            "a later turn brings new images, which a warm cache cannot take; pass the whole"
            " conversation with all its images and an empty cache."
        )
    turn = {k: v for k, v in kwargs.items() if k not in host.image_keys}
    turn["input_ids"] = torch.cat([first.short_ids.to(ids.device), tail], dim=1)
    mask = kwargs.get("attention_mask")
    rest = torch.ones_like(tail) if mask is None else mask[:, length:].to(ids.device)
    head = first.short_mask.to(rest.device, rest.dtype)
    turn["attention_mask"] = torch.cat([head, rest], dim=1)
    return turn, ids


def adjust(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shown: Shown) -> None:
    """Keep the meaning of arguments that count or read the prompt."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    config = args[0] if args else kwargs.get("generation_config")
    lost = shown.input_ids.shape[1] - shown.short_length
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if _setting(new, kwargs, config, model) is None:
            value = _setting(total, kwargs, config, model)
            if value:
                kwargs[total] = max(value - lost, 0)
    if criteria := kwargs.get("stopping_criteria"):
        items = [_OnWholePromptStop(shown, c) for c in _as_list(criteria)]
        kwargs["stopping_criteria"] = StoppingCriteriaList(items)
    if processors := kwargs.get("logits_processor"):
        items = [_OnWholePrompt(shown, p) for p in _as_list(processors)]
        kwargs["logits_processor"] = LogitsProcessorList(items)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _setting(name: str, kwargs: dict[str, Any], config: Any, model: Any) -> Any:
    """A generation setting, as generate() looks it up."""
    for source in (kwargs.get(name), getattr(config, name, None)):
        if source is not None:
            return source
    return getattr(model.generation_config, name, None)


class _OnWholePrompt:
    """A caller's logits processor, shown the caller's prompt instead of the short one."""

    def __init__(self, shown: Shown, function: Any) -> None:
        self.shown, self.function = shown, function

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return self.function(self.shown.lengthen(input_ids), scores)


class _OnWholePromptStop(_OnWholePrompt):
    """The same for a stopping criterion."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self.function(self.shown.lengthen(input_ids), scores, **kwargs)


def restore(output: Any, shown: Shown) -> Any:
    """Put the caller's prompt in front of the answer again."""
    if isinstance(output, Tensor):
        return shown.lengthen(output)
    output.sequences = shown.lengthen(output.sequences)
    return output
