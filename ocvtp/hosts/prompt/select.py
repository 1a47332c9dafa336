"""How a pruner before the language model chooses: as it is, compiled, by equally large images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocvtp.pruners import Pruner
from ocvtp.pruners.base import named
from ocvtp.pruners.budgets import Budget
from ocvtp.structures import Selection, VisualTokens

Select = Callable[[Pruner, VisualTokens], Selection]

_COMPILED: WeakKeyDictionary[Pruner, dict[str, Select]] = WeakKeyDictionary()


def select(pruner: Pruner, tokens: VisualTokens) -> Selection:
    """`pruner.select`."""
    return pruner.select(tokens)


def compiled(pruner: Pruner, backend: str = "inductor") -> Select:
    """`select` as one graph, made at the first call and for every new kind of tokens.

    On a GPU the graph is launched as a whole, as a CUDA graph. What was compiled for a pruner is
    kept as long as the pruner. Each budget that a call gives it has graphs of its own, as those of
    one function may be few.

    Args:
        pruner: the one that will be run.
        backend: of `torch.compile`.
    """
    made = _COMPILED.setdefault(pruner, {})
    if backend not in made:
        graphs: dict[tuple[Budget, ...], Select] = {}

        def run(own: Pruner, tokens: VisualTokens) -> Selection:
            if own.amounts not in graphs:
                graphs[own.amounts] = _compile(backend)
            return graphs[own.amounts](own, tokens)

        made[backend] = run
    return made[backend]


def _compile(backend: str) -> Select:
    # A function of its own, because graphs are counted by function and only a few are allowed.
    own = FunctionType(select.__code__.replace(), globals())
    whole = partial(torch.compile, own, fullgraph=True, backend=backend)
    plain, graphs = whole(), whole(mode="reduce-overhead" if backend == "inductor" else None)

    def run(pruner: Pruner, tokens: VisualTokens) -> Selection:
        if not tokens.features.is_cuda:
            return plain(pruner, tokens)
        torch.compiler.cudagraph_mark_step_begin()
        made = graphs(pruner, tokens)  # in memory that the next call writes to
        copies: dict[str, Any] = {k: v.clone() for k, v in vars(made).items() if v is not None}
        return Selection(**copies)

    return run


def select_shares(
    pruner: Pruner,
    tokens: VisualTokens,
    run: Select = select,
    of_images: Sequence[Pruner] | None = None,
) -> Selection:
    """Choose; where a share is kept and images differ in size, that share of each image's tokens.

    Args:
        pruner: the one that chooses.
        tokens: of I images. Those of equal size are chosen from together (`random` draws by the
            place of an image among these).
        run: what runs it.
        of_images: [I] the pruner with the budget of each image; None for `pruner` for all.

    Returns:
        of every image, what its pruner would keep of it alone.

    Raises:
        ValueError: what the pruner refuses, by its name.
    """
    try:
        return _select_images(pruner, tokens, run, of_images)
    except ValueError as error:
        found = named(error, pruner.name)
        raise found from found.__cause__


def _select_images(
    pruner: Pruner, tokens: VisualTokens, run: Select, of_images: Sequence[Pruner] | None
) -> Selection:
    if of_images is None or len(set(of_images)) == 1:
        return _select_shares(pruner if of_images is None else of_images[0], tokens, run)
    made, order = list[Selection](), list[int]()
    for own in dict.fromkeys(of_images):
        images = [number for number, one in enumerate(of_images) if one is own]
        if own.batch_invariant:
            made.append(_select_shares(own, _of(tokens, images), run))
        else:  # an image's place in the batch counts: as if all had this budget
            made.append(_rows_of(_select_shares(own, tokens, run), images))
        order += images
    return _together(made, torch.tensor(order).argsort())


def _select_shares(pruner: Pruner, tokens: VisualTokens, run: Select) -> Selection:
    if tokens.valid is None or not pruner.keeps_share:
        return run(pruner, tokens)
    counts = tokens.valid.sum(dim=1).tolist()
    groups = [[i for i, own in enumerate(counts) if own == count] for count in sorted(set(counts))]
    made = [run(pruner.of_size(counts[images[0]]), _of(tokens, images)) for images in groups]
    order = torch.tensor([image for images in groups for image in images]).argsort()
    return _together(made, order)


def _of(tokens: VisualTokens, images: list[int]) -> VisualTokens:
    """The tokens of some images."""
    return tokens.map(lambda values: values[torch.tensor(images, device=values.device)])


def _rows_of(selection: Selection, images: list[int]) -> Selection:
    """What was kept of some images."""
    index = torch.tensor(images, device=selection.keep_indices.device)
    found = {k: v[index] for k, v in vars(selection).items() if v is not None}
    return Selection(**found)


def _together(made: list[Selection], order: Tensor) -> Selection:
    """Selections of groups of images as one, of images in this order."""
    most = max(selection.keep_indices.shape[1] for selection in made)
    if any(selection.merge is not None for selection in made):
        width = next(s.merge.shape[2] for s in made if s.merge is not None)
        made = [_unmixed(selection, width) for selection in made]
    parts: dict[str, list[Tensor]] = {}
    for selection in made:
        keep = selection.keep_indices
        valid = torch.ones_like(keep, dtype=torch.bool)
        tensors = {"valid": valid} | {k: v for k, v in vars(selection).items() if v is not None}
        for name, values in tensors.items():
            more = (0, 0) * (values.ndim - 2) + (0, most - keep.shape[1])
            parts.setdefault(name, []).append(pad(values, more))
    order = order.to(made[0].keep_indices.device)
    return Selection(**{name: torch.cat(values)[order] for name, values in parts.items()})


def _unmixed(selection: Selection, width: int) -> Selection:
    """The same beside images whose tokens are mixed: each kept token is a row of its own.

    Args:
        selection: of images of equal size.
        width: 1 + N.
    """
    keep = selection.keep_indices
    if selection.merge is not None:
        return selection if selection.anchors is not None else replace(selection, anchors=keep)
    columns = torch.arange(-1, width - 1, device=keep.device)  # the CLS first
    own = keep[:, :, None] == columns
    if selection.valid is not None:
        own &= selection.valid[:, :, None]
    return replace(selection, merge=own.float(), anchors=keep)
