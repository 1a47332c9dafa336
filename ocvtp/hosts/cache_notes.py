"""What a KV cache remembers between calls of a pruned model: the one thing that is left on it.

L are the tokens of the caller's prompt, L' of the short one, L'' those left after a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

_ON_CACHE = "_ocvtp_notes"


@dataclass(frozen=True)
class PromptNote:
    """The prompt that a cache was filled with.

    Args:
        input_ids: [B, L] the caller's.
        pixel_values: its images.
        short_ids: [B, L'].
        short_mask: [B, L'] bool.
        positions: see `Prompt`.
        rope_deltas: see `Prompt`.
    """

    input_ids: Tensor
    pixel_values: Tensor
    short_ids: Tensor
    short_mask: Tensor
    positions: Tensor | None
    rope_deltas: Tensor | None


@dataclass(frozen=True)
class Left:
    """What is left of the prompt from a layer on before which tokens were dropped.

    Args:
        mask: [B, L''] bool, False on padding; None where there is none.
        lost: [B, 1] how far later positions move down; None where they stay.
    """

    mask: Tensor | None
    lost: Tensor | None


@dataclass
class LayersNote:
    """What was dropped inside the language model.

    Args:
        prompt_length: L'.
        stages: what is left, by the layers where tokens were dropped.
    """

    prompt_length: int
    stages: dict[int, Left] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheNotes:
    """All that a cache remembers; a copy of a cache has a copy of them."""

    prompt: PromptNote | None = None
    layers: LayersNote | None = None


def notes_on(cache: Any) -> CacheNotes:
    """What a cache remembers; empty notes if there is no cache."""
    found: CacheNotes = getattr(cache, _ON_CACHE, _NOTHING)
    return found


def leave_note(cache: Any, **notes: Any) -> None:
    """Let a cache remember other notes.

    Args:
        cache: of transformers.
        notes: `prompt`, `layers`, or both; None deletes one.
    """
    found = replace(notes_on(cache), **notes)
    if found.prompt is None and found.layers is None:
        vars(cache).pop(_ON_CACHE, None)
    else:
        setattr(cache, _ON_CACHE, found)


_NOTHING = CacheNotes()
