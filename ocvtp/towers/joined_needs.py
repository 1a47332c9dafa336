"""One look into a vision tower for many pruners: what to record for all, and what each is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ocvtp.structures import Needs, VisualTokens


def joined(needs: Iterable[Needs]) -> list[Needs]:
    """What to record for all; several, where they mean different things by `received` attention."""
    unions: list[Needs] = []
    for own in map(plain, needs):
        for number, union in enumerate(unions):
            if agree(union, own):
                unions[number] = plain(union | own)
                break
        else:
            unions.append(own)
    return unions


def plain(needs: Needs) -> Needs:
    """Without the kind of `received` attention where none is read."""
    return replace(needs, patch_queries=needs.patch_queries and needs.reads_received)


def agree(a: Needs, b: Needs) -> bool:
    """Whether two mean the same by `received` attention."""
    both = a.reads_received and b.reads_received
    return not both or a.patch_queries == b.patch_queries


def covers(union: Needs, needs: Needs) -> bool:
    """Whether what was recorded for `union` holds all that `needs` names."""
    if not agree(union, needs):
        return False
    return union | replace(needs, patch_queries=union.patch_queries) == union


def only(tokens: VisualTokens, needs: Needs) -> VisualTokens:
    """What is given for just these needs; the tensors are the same."""

    def named(values: Any, names: Sequence[Any]) -> dict[Any, Tensor]:
        return {name: values[name] for name in names if name in values}

    return replace(
        tokens,
        hidden=named(tokens.hidden, needs.hidden),
        attention=named(tokens.attention, needs.attention),
        keys=named(tokens.keys, needs.keys),
        cls_keys=named(tokens.cls_keys, needs.keys),
        cls_queries=named(tokens.cls_queries, needs.keys),
        cls=tokens.cls if needs.cls else None,
        projected=tokens.projected if needs.projected else None,
    )
