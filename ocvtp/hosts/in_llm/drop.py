"""One run through the language model in which tokens are dropped, or were.

L' columns of the prompt as it is now, L'' of them left after a stage, T columns after the prompt,
q columns of the pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.cache_notes import LayersNote, Left
from ocvtp.hosts.in_llm.plan import LayerPlan, Stayed
from ocvtp.hosts.in_llm.prompt_state import Current, Place, tokens_at
from ocvtp.ops.merging import merge
from ocvtp.pruners.base import named
from ocvtp.structures import take
from ocvtp.transformers_names import causal_mask


@dataclass
class Pass:
    """One run through the language model.

    Args:
        model: the language model.
        note: of the cache.
        plan: in the pass that reads the prompt.
        positions: [1 or B, q], if tokens are numbered again.
        tail: [B, T] mask of what follows the prompt, None where all of it counts.
        num_tail: T, all that is in the cache and in this pass.
        current: the prompt as it is now, in the pass that reads it.
        cache: of all layers, from the first on that has a hook.
        prepared: mask and position embeddings for the layers after a stage.
    """

    model: Any
    note: LayersNote
    plan: LayerPlan | None
    positions: Tensor | None
    tail: Tensor | None
    num_tail: int
    current: Current | None = None
    cache: Any = None
    prepared: dict[int, tuple[Tensor | None, Any]] = field(default_factory=dict)


def drop(run: Pass, place: Place) -> Tensor:
    """[B, q, D'] -> [B, L'' + T, D']."""
    plan, current = run.plan, run.current
    assert plan is not None
    assert current is not None
    if current.mask.device != place.hidden.device:
        current.to(place.hidden.device)
    hidden, keep = _choose(plan, current, place)
    length = int(keep.sum(dim=1).max()) if current.lengths is None else max(current.lengths)
    # A stable sort moves what stays to one side and keeps its order.
    order = keep.int().argsort(dim=1, descending=plan.pads_right, stable=True)
    index = order[:, :length] if plan.pads_right else order[:, order.shape[1] - length :]
    columns = current.shrink(index, keep.gather(1, index))
    hidden = take(hidden, columns)
    new = None
    if plan.renumber:
        numbers = (current.mask.long().cumsum(dim=1) - 1).clamp(min=0)
        assert run.positions is not None
        run.positions = run.positions.to(numbers.device)
        last = plan.last[:, None].to(numbers.device)
        before = run.positions.expand(len(numbers), -1).gather(1, last)
        new = numbers, before - numbers.amax(dim=1, keepdim=True)
    current.rope = _rope(run, hidden, place.rope, columns, new)
    even = current.lengths is not None and len(set(current.lengths)) == 1
    lost = None if new is None else new[1]
    run.note.stages[place.number] = Left(None if even else current.mask, lost)
    return hidden


def _choose(plan: LayerPlan, current: Current, place: Place) -> tuple[Tensor, Tensor]:
    """Hidden states, some of them merged, and [B, L'] bool which columns stay."""
    keep, hidden, groups = current.mask.clone(), place.hidden, []
    counted, lengths = current.lengths is not None, list(current.lengths or plan.lengths)
    for group in current.groups:
        with torch.no_grad():
            tokens = tokens_at(plan, current, group, place)
            num_keep = group.num_keep(place.number)
            try:
                selection = group.pruner.select_at(tokens, place.number, num_keep)
            except ValueError as error:
                found = named(error, group.pruner.name)
                raise found from found.__cause__
        if not plan.renumber:
            selection = selection.in_raster_order()
        rows, kept = group.rows[:, None], selection.keep_indices
        columns = group.columns.gather(1, kept)
        keep[rows, group.columns] = False
        keep[rows, columns] = True if selection.valid is None else selection.valid
        if selection.merge is not None:
            hidden = hidden.clone() if hidden is place.hidden else hidden
            hidden[rows, columns] = merge(tokens, selection.merge)
        here = kept if selection.anchors is None else selection.anchors
        places = group.places.gather(1, here)
        groups.append(replace(group, columns=columns, places=places))
        plan.kept.append(Stayed(place.number, group.images, places, selection.valid))
        counted &= selection.valid is None
        for row in group.row_numbers:
            lengths[row] -= tokens.num_tokens - kept.shape[1]
    current.groups = tuple(groups)
    current.lengths = tuple(lengths) if counted else None
    return hidden, keep


def _rope(run: Pass, hidden: Tensor, rope: Any, columns: Tensor, new: Any) -> Any:
    """Position embeddings of what is left: gathered, or computed again."""
    if new is None:
        return tuple(_take_columns(part, columns) for part in rope)
    numbers, lost = new
    assert run.positions is not None
    after = run.positions[:, run.note.prompt_length :].expand(len(numbers), -1) - lost
    return run.model.rotary_emb(hidden, torch.cat([numbers, after], dim=1))


def _take_columns(part: Tensor, columns: Tensor) -> Tensor:
    """[..., 1 or B, q, d] at columns [B, L'' + T]: [..., B, L'' + T, d]."""
    part = part.to(columns.device)
    part = part.expand(*part.shape[:-3], len(columns), *part.shape[-2:])
    columns = columns[:, :, None].expand(*part.shape[:-2], -1, part.shape[-1])
    return part.gather(-2, columns)


def prepare(
    run: Pass, stage: int, number: int, hidden: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor | None, Any]:
    """Mask and position embeddings of a pass after a stage."""
    left = run.note.stages[stage]
    mask, tail = left.mask, run.tail
    if mask is not None or tail is not None:
        size = (len(hidden), run.num_tail)
        if tail is None:
            tail = torch.ones(size, dtype=torch.bool, device=hidden.device)
        if mask is None:
            length = run.cache.get_seq_length(number) + hidden.shape[1] - run.num_tail
            mask = torch.ones((len(hidden), length), dtype=torch.bool, device=hidden.device)
        mask = torch.cat([mask.to(hidden.device), tail.to(hidden.device)], dim=1)
    causal = causal_mask(run.model.config, hidden, mask, run.cache, number)
    if run.current is not None:
        return causal, run.current.rope
    if left.lost is None:
        return causal, kwargs["position_embeddings"]
    assert run.positions is not None
    positions = run.positions.to(hidden.device) - left.lost.to(hidden.device)
    return causal, run.model.rotary_emb(hidden, positions)
