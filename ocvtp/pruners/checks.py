"""Whether a pruner keeps to the contract: for methods of your own, before a model sees them.

`check_pruner` shows a pruner random tokens that hold just what it needs, so it takes no model and
well under a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ocvtp.pruners.base import Pruner
from ocvtp.structures import Needs, Selection, Stage, VisualTokens

WIDTH = 8
_STAGES: tuple[Stage, ...] = ("encoder", "llm_input")
_TEXT, _PARTS = 5, 2
_WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "item",
    "masked_select",
    "unique",
    "is_nonzero",
    "equal",
)


def check_pruner(pruner: Pruner, grid_hw: tuple[int, int] = (6, 3), batch_size: int = 3) -> None:
    """Check that a pruner does what hosts rely on.

    Checked for every K from 1 to N + 1, with images of one size and of several:

    - exactly K unique ascending indices of real tokens, or all of an image that has fewer;
    - an image keeps the same tokens alone, in a batch and next to padding;
    - the input is not changed, and a second call gives the same;
    - bf16, equal tokens, and that the host never waits for the device.

    Args:
        pruner: of stage `encoder` or `llm_input`; its own budget does not matter.
        grid_hw: rows and columns of the largest image; at least 2 rows.
        batch_size: B, at least 2.

    Raises:
        ValueError: that says what is broken, and for which K; or if it cannot be checked here.
    """
    part = pruner.parts[0]
    if len(pruner.parts) > 1 or part.stage not in _STAGES:
        raise ValueError(
            f"pruner {pruner.name!r} acts at stage {' + '.join(p.stage for p in pruner.parts)};"
            f" only those of one stage, {' or '.join(_STAGES)}, can be checked here: hold others"
            " to the bare model with the dropped columns masked (CONTRIBUTING.md, Other stages)."
        )
    if grid_hw[0] < 2 or batch_size < 2:
        raise ValueError(f"{grid_hw=}, {batch_size=}; pass at least 2 rows and 2 images.")
    for num_keep in range(1, grid_hw[0] * grid_hw[1] + 2):
        at_k = replace(pruner, num_keep=num_keep, keep_ratio=None)
        with _explained(pruner, num_keep):
            for ragged in (False, True):
                tokens = random_tokens(pruner.needs, batch_size, grid_hw, ragged=ragged)
                together = _select(at_k, tokens)
                _check_budget(at_k, together, tokens, num_keep)
                _check_merge(at_k, together, tokens)
                _check_alone(at_k, together, tokens, grid_hw)
            _check_precision(at_k, tokens)
            _check_equal_tokens(at_k, tokens, num_keep)


def random_tokens(
    needs: Needs,
    batch_size: int,
    grid_hw: tuple[int, int],
    *,
    seed: int = 0,
    ragged: bool = False,
    features: int = WIDTH,
    tower: int = WIDTH,
    projected: int = WIDTH,
    num_heads: int = 2,
) -> VisualTokens:
    """Visual tokens of normal random numbers that hold just what `needs` names.

    Args:
        needs: of a pruner.
        batch_size: B. An image is the same whatever B is.
        grid_hw: rows and columns.
        seed: of the numbers.
        ragged: whether every second image lacks the last row of the grid: padding.
        features: width of these, and of the CLS. tower: of what is read inside of it.
        projected: width of these, and of the text.
        num_heads: of the tower.
    """
    count = grid_hw[0] * grid_hw[1]
    rows = torch.arange(batch_size)[:, None]

    def draw(stream: int, *shape: int) -> Tensor:
        images = []
        for image in range(batch_size):
            own = torch.Generator().manual_seed(seed * 10_007 + image * 101 + stream)
            images.append(torch.randn(*shape, generator=own))
        return torch.stack(images)

    def many(stream: int, width: int = tower) -> Tensor:
        return draw(stream, count, width)

    return VisualTokens(
        features=many(0, features),
        grid_hw=grid_hw,
        valid=torch.arange(count) < count - (rows % 2) * grid_hw[1] if ragged else None,
        cls=draw(1, features) if needs.cls else None,
        hidden={layer: many(20 + i) for i, layer in enumerate(needs.hidden)},
        attention={k: draw(40 + i, count).softmax(1) for i, k in enumerate(needs.attention)},
        keys={block: many(60 + i) for i, block in enumerate(needs.keys)},
        cls_keys={block: draw(80 + i, tower) for i, block in enumerate(needs.keys)},
        cls_queries={block: draw(90 + i, tower) for i, block in enumerate(needs.keys)},
        num_heads=num_heads,
        projected=many(2, projected) if needs.projected else None,
        text=draw(3, _TEXT, projected) if needs.text else None,
        text_valid=torch.arange(_TEXT) < _TEXT - rows % 3 if needs.text else None,
        clip_visual=draw(4, count, 4) if needs.clip else None,
        clip_text=draw(5, _PARTS, 4) if needs.clip else None,
        clip_text_valid=torch.arange(_PARTS) < 1 + rows % 2 if needs.clip else None,
    )


class _Broken(Exception):
    """What a pruner breaks, and what to do."""


@contextmanager
def _explained(pruner: Pruner, num_keep: int) -> Iterator[None]:
    try:
        yield
    except _Broken as broken:
        name = pruner.name or type(pruner).__name__
        raise ValueError(f"pruner {name!r} with num_keep={num_keep}: {broken}") from broken


class _NoWaiting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation = func.overloadpacket.__name__
        masks = (
            operation.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple)
        )
        by_mask = masks and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or operation.startswith(_WAITS):
            what = "a boolean index" if by_mask else operation
            raise _Broken(
                f"{what} in `_select` makes the host wait for the device; use torch.where, gather"
                " and masks, and no Python branch on values."
            )
        return func(*args, **(kwargs or {}))


def _select(pruner: Pruner, tokens: VisualTokens) -> Selection:
    """What is kept, twice; the tokens must be as before."""
    before = tokens.map(torch.clone)
    with _NoWaiting():
        selection = pruner.select(tokens)
        again = pruner.select(tokens)
    if not _same(selection, again):
        raise _Broken("the same tokens gave another selection; draw from a seeded torch.Generator.")
    if any(not torch.equal(*pair) for pair in zip(_tensors(before), _tensors(tokens), strict=True)):
        raise _Broken("the given tokens were changed; work on copies.")
    return selection


def _check_budget(
    pruner: Pruner, selection: Selection, tokens: VisualTokens, num_keep: int
) -> None:
    keep, real = selection.keep_indices, tokens.real
    if keep.dtype != torch.int64 or keep.ndim != 2 or len(keep) != tokens.batch_size:
        raise _Broken(
            f"keep_indices are {keep.dtype} {list(keep.shape)}; return int64 [{len(real)}, K]."
        )
    valid = torch.ones_like(keep, dtype=torch.bool) if selection.valid is None else selection.valid
    for image, (chosen, counts) in enumerate(zip(keep, valid, strict=True)):
        some = chosen[counts]
        most = min(num_keep, int(real[image].sum()))
        if (len(some) != most) if pruner.exact else not 1 <= len(some) <= most:
            raise _Broken(f"image {image} keeps {len(some)} tokens; keep {most}.")
        if not bool((some.diff() > 0).all()) or not counts[: len(some)].all():
            raise _Broken(
                f"image {image} keeps {some.tolist()}; return unique ascending indices, those that"
                " count first (`ocvtp.ops.selection.ascending` does it)."
            )
        if some.min() < 0 or some.max() >= tokens.num_tokens or not real[image][some].all():
            raise _Broken(f"image {image} keeps padding, or what is no token: {some.tolist()}.")


def _check_merge(pruner: Pruner, selection: Selection, tokens: VisualTokens) -> None:
    merge = selection.merge
    if merge is None:
        return
    shape = [*selection.keep_indices.shape, 1 + tokens.num_tokens]
    if not pruner.merging or list(merge.shape) != shape or not merge.isfinite().all():
        raise _Broken(
            f"merge is {list(merge.shape)} with merging={pruner.merging}; set `merging = True` and"
            f" return finite weights {shape} over CLS and tokens."
        )


def _check_alone(
    pruner: Pruner, together: Selection, tokens: VisualTokens, grid_hw: tuple[int, int]
) -> None:
    counts = tokens.real.sum(dim=1).tolist()
    for image in range(tokens.batch_size if pruner.batch_invariant else 1):
        alone = _cut(tokens, image, counts[image], grid_hw)
        found = pruner.select(alone).keep_indices[0]
        kept = together.keep_indices[image]
        kept = kept if together.valid is None else kept[together.valid[image]]
        if not torch.equal(found, kept):
            beside = "" if tokens.valid is None else " and beside padding (`tokens.valid`)"
            raise _Broken(
                f"image {image} keeps {kept.tolist()} in a batch{beside}, but {found.tolist()}"
                " alone; sum over dim=1 only, and mask what is padding."
            )


def _cut(tokens: VisualTokens, image: int, count: int, grid_hw: tuple[int, int]) -> VisualTokens:
    num_tokens = tokens.num_tokens
    one = tokens.map(lambda t: t[image : image + 1])
    short = one.map(lambda t: t[:, :count] if t.shape[1:2] == (num_tokens,) else t)
    return replace(short, valid=None, grid_hw=(count // grid_hw[1], grid_hw[1]))


def _check_precision(pruner: Pruner, tokens: VisualTokens) -> None:
    half = tokens.map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    try:
        pruner.select(half)
    except RuntimeError as error:
        raise _Broken(f"bf16 tokens fail ({error}); compute in fp32: `.float()`.") from error


def _check_equal_tokens(pruner: Pruner, tokens: VisualTokens, num_keep: int) -> None:
    flat = tokens.map(lambda t: torch.ones_like(t) if t.is_floating_point() else t)
    try:
        _check_budget(pruner, pruner.select(flat), flat, num_keep)
    except _Broken as broken:
        raise _Broken(f"where all tokens are equal, {broken}") from broken


def _same(a: Selection, b: Selection) -> bool:
    both = [[t for t in (s.keep_indices, s.valid, s.merge) if t is not None] for s in (a, b)]
    return len(both[0]) == len(both[1]) and all(map(torch.equal, *both))


def _tensors(tokens: VisualTokens) -> list[Tensor]:
    found: list[Tensor] = []
    for one in fields(tokens):
        value = getattr(tokens, one.name)
        values = value.values() if isinstance(value, dict) else [value]
        found += [tensor for tensor in values if isinstance(tensor, Tensor)]
    return found
