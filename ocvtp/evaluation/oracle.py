"""The control that knows where the objects are. O are the objects of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ocvtp.ops.selection import top_k
from ocvtp.pruners.base import Pruner, Status
from ocvtp.structures import Selection, VisualTokens

LEAST_COVER = 0.22
"""Part of a cell from which on its token shows an object."""


@dataclass(kw_only=True, eq=False)
class Oracle(Pruner):
    """Keep the tokens on the objects, the one that shows most of each first; then the background.

    It is made for the images of one batch. No method knows the masks, so it is no bound that one
    could reach; but a model for which it does not win at small budgets reads the background, and
    figures on that model say little about pruners.

    Args:
        seen: of each row of the batch [O, H, W], the objects in the picture that the tower sees.
    """

    seen: Sequence[NDArray[np.bool_]] = field(repr=False)

    name = "oracle"
    status: ClassVar[Status] = "control"
    batch_invariant: ClassVar[bool] = False

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        grid = self._grid(tokens)
        scores = np.stack([object_first(on_cells(seen, grid)) for seen in self.seen])
        on_device = torch.from_numpy(scores).to(tokens.features.device)
        return top_k(on_device.float(), num_keep, tokens.valid)


def on_cells(seen: NDArray[np.bool_], grid_hw: tuple[int, int]) -> NDArray[np.float64]:
    """[O, H, W] objects -> [O, N] the part of every cell of a grid that each of them covers."""
    height, width = (pixels // count for pixels, count in zip(seen.shape[1:], grid_hw, strict=True))
    whole = seen[:, : height * grid_hw[0], : width * grid_hw[1]]
    cells = whole.reshape(len(seen), grid_hw[0], height, grid_hw[1], width)
    return np.asarray(cells.mean(axis=(2, 4)).reshape(len(seen), grid_hw[0] * grid_hw[1]))


def object_first(cover: NDArray[np.float64]) -> NDArray[np.float64]:
    """[O, N] parts of cells -> [N] scores: minus the place of a token among those of its object.

    A token belongs to the object that covers most of its cell. The background comes last, spread
    over the image.
    """
    num_tokens = cover.shape[1]
    spread: NDArray[np.float64] = np.random.default_rng(0).random((num_tokens,))
    if len(cover) == 0:
        return spread
    owner, most = cover.argmax(0), cover.max(0)
    shown = most >= LEAST_COVER
    shown[cover.argmax(1)[cover.max(1) > 0]] = True  # tiny objects have one token too
    order = np.lexsort((-most, owner, ~shown))  # by object, its fullest cell first
    first = np.r_[True, owner[order][1:] != owner[order][:-1]]
    number = np.arange(num_tokens)
    place = number - np.maximum.accumulate(np.where(first, number, 0))
    scores = np.empty(num_tokens)
    scores[order] = -place - spread[order] / 2  # among equals, any
    scores[~shown] = spread[~shown] - 2 * num_tokens
    return scores
