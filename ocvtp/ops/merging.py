"""Merge matrices: kept tokens as weighted sums of the CLS and all tokens; K are their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ocvtp.ops.selection import ascending, descending, mask_of, ranks
from ocvtp.ops.similarity import full, unit
from ocvtp.structures import Selection, VisualTokens, take


def merged(merge: Tensor, anchors: Tensor, valid: Tensor | None = None) -> Selection:
    """The selection of a merge matrix.

    Args:
        merge: [B, K, 1 + N], rows in the order in which the language model reads them.
        anchors: [B, K], unique: the token whose place each row takes.
        valid: [B, K] bool, True first; None when all rows count.
    """
    if valid is None:
        return Selection(anchors.sort(dim=1).values, None, merge, anchors)
    num_tokens = merge.shape[2] - 1
    late = anchors + num_tokens * ~valid
    keep_indices = late.sort(dim=1).values % num_tokens
    return Selection(keep_indices, valid, merge * valid[:, :, None], anchors)


def merge_rows(row_of: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """[B, num_rows, 1 + N] from the one row that every token goes to.

    Args:
        row_of: [B, N] row numbers; `num_rows` for tokens that go nowhere.
        weights: [B, N].
        num_rows: K.
    """
    merge = weights.new_zeros(len(row_of), num_rows + 1, 1 + row_of.shape[1])
    merge[:, :, 1:].scatter_(1, row_of[:, None], weights[:, None])
    return merge[:, :num_rows]


def kept_and_rest(order: Tensor, num_kept: Tensor, rest_weights: Tensor, num_rows: int) -> Tensor:
    """Rows that hold one kept token each, and after them one row for all the others.

    Args:
        order: [B, N] token numbers, the kept ones first.
        num_kept: [B, 1].
        rest_weights: [B, N], weights in the last row; 0 on padding.
        num_rows: of the matrix, at least `num_kept + 1`.
    """
    row_of = ranks(order).minimum(num_kept)  # [B, N]
    one = torch.ones_like(rest_weights)
    return merge_rows(row_of, torch.where(row_of < num_kept, one, rest_weights), num_rows)


def dominant_and_contextual(
    scores: Tensor,
    metric: Tensor,
    num_dominant: int,
    num_contextual: int,
    with_cls: bool,
    valid: Tensor | None,
) -> Selection:
    """VisionZip's two kinds of tokens; rows: [CLS], dominant in raster order, contextual.

    The best tokens are kept. Of the rest, every step-th is a target; each other token joins the
    target most similar to it, and a contextual token is its target plus the mean of what joined.

    Args:
        scores: [B, N].
        metric: [B, N, d], what similarity is measured on.
        num_dominant: patch tokens kept as they are, CLS apart.
        num_contextual: targets.
        with_cls: whether the CLS is one more row, the first.
        valid: [B, N] bool; an image must have as many real tokens as rows.
    """
    num_tokens = scores.shape[1]
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    best = descending(scores, None)
    dominant = best[:, :num_dominant].sort(dim=1).values
    rest = ~mask_of(dominant, num_tokens)
    rest = rest if valid is None else rest & valid
    targets, joins = _targets(rest, num_contextual)
    first_contextual = int(with_cls) + num_dominant
    num_rows = first_contextual + num_contextual

    row_of = torch.full_like(best, num_rows)
    rows = torch.arange(num_rows, device=best.device).expand(len(best), -1)
    row_of = row_of.scatter(1, dominant, rows[:, int(with_cls) : first_contextual])
    weights = scores.new_ones(scores.shape)
    if num_contextual:
        directions = unit(metric)
        joined = (directions @ take(directions, targets).transpose(1, 2)).argmax(dim=2)  # [B, N]
        row_of = torch.where(joins, first_contextual + joined, row_of)
        members = joins[:, None] & (joined[:, None] == rows[:, :num_contextual, None])
        share = 1 / members.sum(dim=2).clamp(min=1)  # [B, contextual]
        weights = torch.where(joins, share.gather(1, joined).to(weights), weights)
        row_of = row_of.scatter(1, targets, rows[:, first_contextual:])
    merge = merge_rows(row_of, weights, num_rows)
    anchors = torch.cat([dominant, targets], dim=1)
    if with_cls:
        merge[:, 0, 0] = 1
        # The CLS has no place in the image: it takes that of the best token that is left.
        free = scores.masked_fill(mask_of(anchors, num_tokens), float("-inf"))
        anchors = torch.cat([free.argmax(dim=1, keepdim=True), anchors], dim=1)
    return merged(merge, anchors)


def contextual_share(num: int | None, share: float, num_keep: int, most: int) -> int:
    """How many of K tokens are merged ones: `num`, or a share of K where it is None.

    Raises:
        ValueError: if `num` is below 0 or above `most`.
    """
    if num is None:
        return min(round(num_keep * share), most)
    if not 0 <= num <= most:
        raise ValueError(
            f"num_contextual={num} of num_keep={num_keep}; pass 0 to {most}, or None for the"
            " paper's share of any budget (a published setting names a number, which is for its own"
            f" budget alone), or keep {num_keep - most + num} tokens or more."
        )
    return num


def head_mean(keys: Tensor, num_heads: int | None) -> Tensor:
    """[B, N, D], heads side by side -> [B, N, d]."""
    assert num_heads is not None, "keys come with num_heads"
    return full(keys).view(*keys.shape[:2], num_heads, -1).mean(dim=2)


def _targets(rest: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Every step-th token of `rest` [B, N], [B, num], and a mask of the others."""
    step = (rest.sum(dim=1, keepdim=True) // max(num, 1)).clamp(min=1)  # [B, 1]
    rank = rest.cumsum(dim=1) - 1
    is_target = rest & (rank % step == 0) & (rank < num * step)
    targets = is_target.sort(dim=1, descending=True, stable=True).indices[:, :num]
    return targets, rest & ~is_target


def keep_all(tokens: VisualTokens) -> Selection:
    """All tokens, unchanged."""
    everything = torch.arange(tokens.num_tokens, device=tokens.features.device)
    return ascending(everything.repeat(tokens.batch_size, 1), tokens.valid, tokens.num_tokens)


def keep_short_images(
    selection: Selection, tokens: VisualTokens, or_equal: bool = False
) -> Selection:
    """Leave images alone that have fewer real tokens than the budget.

    Args:
        selection: of exactly K rows.
        tokens: with `valid`.
        or_equal: whether those with as many are left alone too.
    """
    assert tokens.valid is not None
    assert selection.merge is not None
    num_tokens, num_keep = tokens.num_tokens, selection.keep_indices.shape[1]
    whole = keep_all(tokens)
    assert whole.valid is not None
    keep, real = whole.keep_indices[:, :num_keep], whole.valid[:, :num_keep]
    columns = torch.arange(-1, num_tokens, device=keep.device)  # the CLS first
    identity = (keep[:, :, None] == columns) & real[:, :, None]
    short = tokens.valid.sum(dim=1, keepdim=True) < num_keep + or_equal  # [B, 1]
    anchors = selection.keep_indices if selection.anchors is None else selection.anchors
    return Selection(
        keep_indices=torch.where(short, keep, selection.keep_indices),
        valid=real | ~short,
        merge=torch.where(short[:, :, None], identity.to(selection.merge), selection.merge),
        anchors=torch.where(short, keep, anchors),
    )


def merge(tokens: VisualTokens, weights: Tensor) -> Tensor:
    """Mix tokens of the tower, in fp32 or better, and round once.

    Args:
        tokens: [I, N, D]; their CLS is read where there is one.
        weights: [I, K, 1 + N], see `Selection.merge`.

    Returns:
        [I, K, D]. A row whose only weight is a 1 is that token, bit for bit.
    """
    states = tokens.features
    wide = torch.promote_types(states.dtype, torch.float32)
    weights = weights[:, :, 1 if tokens.cls is None else 0 :].to(states.device)
    with torch.autocast(states.device.type, enabled=False):
        if tokens.cls is not None:
            states = torch.cat([tokens.cls[:, None], states], dim=1)
        mixed = (weights.to(wide) @ states.to(wide)).to(states.dtype)
    chosen = weights.argmax(dim=2, keepdim=True)  # [I, K, 1]
    alone = (weights != 0).sum(dim=2, keepdim=True) == 1
    alone &= weights.gather(2, chosen) == 1
    return torch.where(alone, take(states, chosen.squeeze(2)), mixed)
