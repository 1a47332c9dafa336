"""generate() on a short prompt that looks to its caller like generate() on the whole one.

L tokens of the caller's prompt, L' of the short one.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shown:
    """What the caller is shown in place of the short prompt.

    Args:
        input_ids: [B, L] the caller's prompt.
        short_length: L'.
    """

    input_ids: Tensor
    short_length: int

    @property
    def lost(self) -> int:
        """L - L', columns that were dropped."""
        return self.input_ids.shape[1] - self.short_length

    def lengthen(self, sequences: Tensor) -> Tensor:
        """Replace the short prompt at the start of [B * beams, L' + n] by the caller's."""
        ids = self.input_ids.to(sequences.device)
        ids = ids.repeat_interleave(sequences.shape[0] // ids.shape[0], dim=0)
        return torch.cat([ids, sequences[:, self.short_length :]], dim=1)


@dataclass
class Callers:
    """Those of the caller's arguments that read prompts.

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

    def check_found(self) -> None:
        """Refuse an answer to what may be another prompt.

        Raises:
            ValueError: if generate() has used some in a way that is not known.
        """
        if self.waiting:
            names = ", ".join(getattr(one, "__name__", type(one).__name__) for one in self.waiting)
            raise ValueError(
                f"generate() did not put {names} among its own processors and criteria, so that"
                " they may have read another prompt than yours; leave them out while a pruner is"
                " attached."
            )


def _is_of(item: Any, own: Any) -> bool:
    held = vars(item).values() if hasattr(item, "__dict__") else ()
    return item is own or any(part is own for part in held)


def callers_of(kwargs: dict[str, Any], shown: Shown) -> Callers | None:
    """What among the arguments of generate() reads the prompt; None if nothing does."""
    lists = (kwargs.get("logits_processor"), kwargs.get("stopping_criteria"))
    items = [item for some in lists if isinstance(some, (list, tuple)) for item in some]
    if (constraint := kwargs.get("prefix_allowed_tokens_fn")) is not None:
        items.append(constraint)
    return Callers(items, shown) if items else None


def given_or_inferred_mask(model: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The caller's mask; without one, padding is found by its id, as generate() does."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    pad = _setting("pad_token_id", kwargs, model)
    if mask is not None or ids is None or pad is None:
        return mask
    end = _setting("eos_token_id", kwargs, model)
    ends = end if isinstance(end, (list, tuple)) else [end]
    real: Tensor = ids != pad
    return None if pad in ends or bool(real.all()) else real.long()


def check_layers(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what is impossible while tokens are dropped inside the language model.

    Raises:
        ValueError: if the prompt is to be read in chunks.
    """
    if chunk := _setting("prefill_chunk_size", kwargs, model):
        raise ValueError(
            f"prefill_chunk_size={chunk}: pruners that drop tokens inside the language model look"
            " back from the prompt's last token, so they read it at once; leave it out."
        )


def adjust(model: Any, kwargs: dict[str, Any], shown: Shown) -> None:
    """Keep the meaning of arguments that count the prompt; `callers` is for those that read it."""
    _shift_lengths(model, kwargs, shown)
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _StreamWholePrompt(kwargs["streamer"], shown)


def _shift_lengths(model: Any, kwargs: dict[str, Any], shown: Shown) -> None:
    """Lengths that count the prompt, for the short one."""
    for name in ("max_length", "min_length"):
        if value := _setting(name, kwargs, model):
            _set(name, max(value - shown.lost, 0), kwargs)
    if chunk := _setting("prefill_chunk_size", kwargs, model):
        size = max(chunk, 2)
        while shown.short_length % size == 1:  # a single column would look like a decode step
            size += 1
        _set("prefill_chunk_size", size, kwargs)


def _setting(name: str, kwargs: dict[str, Any], model: Any) -> Any:
    """A generation setting, as generate() looks it up."""
    given = kwargs.get(name)
    for config in (kwargs.get("generation_config"), model.generation_config):
        if given is None:
            given = getattr(config, name, None)
    return given


def _set(name: str, value: int, kwargs: dict[str, Any]) -> None:
    """Change a setting where the caller gave it: generate() wants them in one place."""
    config = kwargs.get("generation_config")
    if config is None or kwargs.get(name) is not None:
        kwargs[name] = value
    else:
        kwargs["generation_config"] = config = copy(config)
        setattr(config, name, value)


class _StreamWholePrompt:
    """A caller's streamer, which gets the prompt first and then the answer, piece by piece."""

    def __init__(self, inner: Any, shown: Shown) -> None:
        self.inner, self.shown, self.has_prompt = inner, shown, False

    def put(self, value: Tensor) -> None:
        self.inner.put(value if self.has_prompt else self.shown.lengthen(value))
        self.has_prompt = True

    def end(self) -> None:
        self.inner.end()


def restore(output: Any, shown: Shown) -> Any:
    """Put the caller's prompt before the answer again."""
    if isinstance(output, Tensor):
        return shown.lengthen(output)
    output.sequences = shown.lengthen(output.sequences)
    return output
