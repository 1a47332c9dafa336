"""Looking inside a vision tower without copying its forward and without its full attention.

T tokens of the tower (CLS included), N patch tokens, H heads.

A few forward hooks record what `Needs` names: layer outputs, and the queries and keys of single
blocks, from which one row or mean of the attention is computed afterwards, in fp32. The tower keeps
its fast attention. Hooks act only inside `recording()`, per thread and per call, and store nothing
on the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ocvtp.structures import OF_CLS, AttentionKind, Needs, take
from ocvtp.towers.hooks import Hook, after, before
from ocvtp.towers.recordings import Recording as Recording
from ocvtp.towers.recordings import current as current
from ocvtp.towers.recordings import (
    keep_features,
    keep_input,
    keep_normed,
    keep_output,
    keep_segments,
    keep_turn,
)
from ocvtp.towers.recordings import recording as recording
from ocvtp.towers.rows import Rows

_CHUNK_BYTES = 64 * 2**20  # of fp32 attention held at once


@dataclass(frozen=True)
class BlockParts:
    """Modules of a block.

    Args:
        attention: the first half, called with `attention_mask` and `position_embeddings`.
        norm: the first module of the second half.
        last: the last module of the second half, perhaps of the first one too: what it gives is
            added to what the half was given.
    """

    attention: nn.Module
    norm: nn.Module
    last: nn.Module


@dataclass(frozen=True)
class Turn:
    """How attention turns queries and keys by their positions.

    Args:
        attention: block -> the module that does.
        argument: of it, that says how far.
        apply: this module, queries or keys [B, H, T, d], that argument -> these, turned.
    """

    attention: Callable[[Any], nn.Module]
    argument: str
    apply: Callable[[Any, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Tower:
    """Where to find things in a vision transformer.

    Args:
        blocks: its blocks, in order.
        num_heads: H.
        query_key: block -> the two modules whose outputs are its queries and its keys, either
            [B, T, D] or [B, H, T, D / H].
        encoder: what hands the arguments it is called with to all blocks; None if nothing does.
        parts: block -> what is in it; None where no pruner acts inside of the tower.
        turn: how attention turns queries and keys by their positions; None if it does not.
        has_cls: whether the first of the tokens before the patches, if there are any, is a CLS.
    """

    blocks: Sequence[nn.Module]
    num_heads: int
    query_key: Callable[[Any], tuple[nn.Module, nn.Module]]
    encoder: nn.Module | None = None
    parts: Callable[[Any], BlockParts] | None = None
    turn: Turn | None = None
    has_cls: bool = True

    def layer(self, number: int) -> int:
        """The non-negative number of a layer of `hidden_states`.

        Raises:
            ValueError: if the tower has no such layer.
        """
        return resolve(number, len(self.blocks) + 1, "hidden_states")

    def block(self, number: int) -> int:
        """The non-negative number of a block."""
        return resolve(number, len(self.blocks), "blocks")


def resolve(number: int, count: int, what: str) -> int:
    """A Python-style index as a non-negative one.

    Raises:
        ValueError: if it is out of range.
    """
    if not -count <= number < count:
        raise ValueError(
            f"{what}[{number}] does not exist in this tower; pass {-count} to {count - 1}."
        )
    return number % count


def hooks_for(tower: Tower, needs: Needs) -> list[Hook]:
    """Hooks that record what `needs` names."""
    hooks = []
    for layer in sorted({tower.layer(i) for i in needs.hidden}):
        if layer == 0:
            pre = partial(keep_input, layer)
            hooks.append(before(tower.blocks[0], pre, with_kwargs=True))
        else:
            hook = partial(keep_output, "hidden", layer)
            hooks.append(after(tower.blocks[layer - 1], hook))
    blocks = {tower.block(number) for number, _ in needs.attention} | {
        tower.block(number) for number in needs.keys
    }
    for block in sorted(blocks):
        query, key = tower.query_key(tower.blocks[block])
        hooks.append(after(query, partial(keep_output, "queries", block)))
        hooks.append(after(key, partial(keep_output, "keys", block)))
        if (turn := tower.turn) is not None:
            keep = partial(keep_turn, block, turn.argument)
            hooks.append(before(turn.attention(tower.blocks[block]), keep, with_kwargs=True))
    return hooks


def keep_features_of(projector: nn.Module) -> Hook:
    """Record what the projector is given as `features`."""
    return before(projector, keep_features)


def keep_normed_of(norm: nn.Module) -> Hook:
    """Record what the norm after the last block gives as `normed`."""
    return after(norm, keep_normed)


def keep_fused_of(number: int, attention: Any) -> list[Hook]:
    """Record the fused projection of a block's patches, their rotations and their segments.

    Args:
        number: of the block.
        attention: its own, with `qkv`, called with `position_embeddings` and `cu_seqlens`.
    """
    return [
        after(attention.qkv, partial(keep_output, "fused", number)),
        before(attention, partial(keep_segments, number), with_kwargs=True),
    ]


def gather(record: Recording, tower: Tower, needs: Needs, num_prefix: int) -> dict[str, Any]:
    """What `needs` names of the tower, under the numbers in `needs`.

    Args:
        record: of a forward that ran with the hooks installed.
        tower: the one that ran.
        needs: as given to `install`.
        num_prefix: tokens before the patches: the CLS, where there is one, and registers.

    Returns:
        Keyword arguments of `VisualTokens`; 0 for tokens that were not there any more.

    Raises:
        ValueError: for CLS attention of a tower without a CLS.
        RuntimeError: if a hook did not fire.
    """
    has_cls = num_prefix > 0 and tower.has_cls
    if not has_cls and any(kind in OF_CLS for _, kind in needs.attention):
        raise ValueError(
            "this vision tower has no CLS token, so there is no CLS attention; use a method (or an"
            " option) that reads `received` attention instead."
        )
    missing = {tower.layer(i) for i in needs.hidden} - record.hidden.keys()
    missing |= {tower.block(b) for b, _ in needs.attention} - record.keys.keys()
    if missing:
        raise RuntimeError(
            f"the vision tower ran but the hooks on {sorted(missing)} did not fire: attach the"
            " pruner before the tower is compiled or exported."
        )
    found: dict[str, Any] = {
        "hidden": {i: record.hidden[tower.layer(i)][:, num_prefix:] for i in needs.hidden},
        "attention": {},
        "num_heads": tower.num_heads,
    }
    for number, kind in needs.attention:
        block = tower.block(number)
        queries, keys = _side_by_side(record.queries[block]), _side_by_side(record.keys[block])
        if (turn := tower.turn) is not None:
            turned = partial(_turned, tower, turn, block, record.turns[block])
            queries, keys = turned(queries), turned(keys)
        rows = record.rows.get(block)
        mean = attention_mean(
            queries, keys, tower.num_heads, kind, num_prefix, needs.patch_queries, rows
        )
        if rows is not None:
            mean = rows.scatter(pad(mean, (num_prefix, 0))[:, :, None])[:, num_prefix:, 0]
        found["attention"][number, kind] = mean

    def whole(store: dict[int, Tensor], block: int) -> Tensor:
        values, rows = _side_by_side(store[block]), record.rows.get(block)
        return values if rows is None else rows.scatter(values)

    keys_of = {i: whole(record.keys, tower.block(i)) for i in needs.keys}
    found["keys"] = {i: keys[:, num_prefix:] for i, keys in keys_of.items()}
    if has_cls:
        queries_of = {i: whole(record.queries, tower.block(i)) for i in needs.keys}
        found["cls_keys"] = {i: keys[:, 0] for i, keys in keys_of.items()}
        found["cls_queries"] = {i: queries[:, 0] for i, queries in queries_of.items()}
    return found


def _turned(tower: Tower, turn: Turn, block: int, how: Any, projected: Tensor) -> Tensor:
    """[B, T, D] queries or keys of a block, turned as its own attention turns them."""
    heads = projected.unflatten(2, (tower.num_heads, -1)).transpose(1, 2)
    return _side_by_side(turn.apply(turn.attention(tower.blocks[block]), heads, how))


def _side_by_side(projected: Tensor) -> Tensor:
    """[B, H, T, D / H] or [B, T, D] -> [B, T, D]."""
    return projected.transpose(1, 2).flatten(2) if projected.ndim == 4 else projected


def attention_mean(
    queries: Tensor,
    keys: Tensor,
    num_heads: int,
    kind: AttentionKind,
    num_prefix: int,
    patch_queries: bool = False,
    rows: Rows | None = None,
) -> Tensor:
    """One row or mean of softmax(q k^T / sqrt(d)), head mean, fp32, in bounded memory.

    Args:
        queries: [B, T, D], all heads side by side.
        keys: [B, T, D].
        num_heads: H.
        kind: of the vision tower, see `AttentionKey`.
        num_prefix: tokens before the patches.
        patch_queries: leave the queries of the prefix tokens out of `received`.
        rows: what the T tokens are, where they are not all; padding among them counts for nothing.

    Returns:
        [B, N], the prefix tokens' own entries left out.
    """
    split = (num_heads, queries.shape[-1] // num_heads)
    real = torch.ones_like(keys[:, :, 0], dtype=torch.float32)  # [B, T]
    if rows is not None and rows.real is not None:
        real = rows.real.float()
    bias = None if rows is None else rows.bias()
    first = 1 if kind in OF_CLS else queries.shape[1]
    start = num_prefix if kind == "received" and patch_queries else 0
    asking = real[:, start:first]  # [B, Q]
    if kind == "global":
        received = attention_mean(queries, keys, num_heads, "received", num_prefix, rows=rows)
        asking = asking * pad(_outstanding(received, real[:, num_prefix:]), (num_prefix, 0))
    q = queries[:, start:first].unflatten(-1, split).transpose(1, 2).float() * split[1] ** -0.5
    k = keys.unflatten(-1, split).permute(0, 2, 3, 1).float()  # [B, H, d, T]
    size = max(1, _CHUNK_BYTES // (4 * q.shape[0] * num_heads * k.shape[-1]))
    total: Tensor | None = None
    given = []
    for chunk, counts in zip(q.split(size, dim=2), asking.split(size, dim=1), strict=True):
        logits = chunk @ k if bias is None else chunk @ k + bias[:, None, None]
        weights = logits.softmax(dim=-1)  # [B, H, rows, T]
        if kind == "cls_sharpest":
            return _sharpest(weights[:, :, 0, num_prefix:], real[:, num_prefix:])
        if kind == "given":
            given.append(weights[..., num_prefix:].sum(dim=(1, 3)))
        else:
            if rows is not None or kind == "global":  # some do not ask, e.g. padding
                weights = weights * counts[:, None, :, None]
            part = weights.sum(dim=(1, 2))
            total = part if total is None else total + part
    if total is None:
        patches = real[:, num_prefix:].sum(dim=1, keepdim=True)
        return torch.cat(given, dim=1)[:, num_prefix:] / (num_heads * patches)
    mean: Tensor = total / (num_heads * asking.sum(dim=1, keepdim=True))
    return mean[:, num_prefix:]


def _sharpest(weights: Tensor, real: Tensor) -> Tensor:
    """[B, N] of the heads [B, H, N] the one whose logarithm has the largest standard deviation."""
    logs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    among = real[:, None] / real.sum(dim=1).clamp(min=1)[:, None, None]
    apart = logs - (among * logs).sum(dim=2, keepdim=True)
    head = (among * apart.square()).sum(dim=2).argmax(dim=1)
    return take(weights, head[:, None])[:, 0] * real


def _outstanding(received: Tensor, real: Tensor) -> Tensor:
    """[B, N] 1 for patches that receive at least twice the mean of the real ones, or the most."""
    received = received * real
    mean = received.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)
    return real * (received >= (2 * mean).minimum(received.amax(dim=1, keepdim=True)))
