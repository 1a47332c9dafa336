"""P is the number of pivots in shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ocvtp.ops.selection import descending, mask_of, ranks
from ocvtp.ops.similarity import full, row, unit
from ocvtp.pruners.base import Status
from ocvtp.pruners.layer_pruner import LayerNeeds, OneStagePruner
from ocvtp.pruners.registry import register
from ocvtp.structures import LayerTokens, Selection, VisualTokens


@register("dart")
@dataclass(kw_only=True, eq=False)
class DART(OneStagePruner):
    """DART: of a few pivots, among image and text, keep the tokens that duplicate them least.

    Paper: https://arxiv.org/abs/2502.11494, section 4.

    Pivots are the visual and text tokens with the largest L1 norm of their keys, all heads side by
    side, turned by their positions. Visual pivots stay, and each of the P pivots in turn takes the
    tokens of the lowest cosine to it from what is left, after the language model's last norm.

    Args:
        num_keep: tokens kept per image, on average over the layers. Of the K that stay before
            `layer`, each pivot takes (K - image_pivots) / P; the first pivots take one more where
            that is no whole number. K = 4 + T is the official code's T where 8 divides T.
        layer: before which tokens are dropped; keys are of the layer before.
        image_pivots: visual tokens that are pivots (K, if that is less).
        text_pivots: text tokens after the image that are pivots (all, if there are fewer).
        legacy: whether pivots come in the order of a CPython set of their columns in the prompt, as
            in the official code, and not in that of the prompt; this waits for the device.
        legacy_start: the column of the first image token then: 35 with LLaVA-1.5's system prompt.
        stages: `((layer, K),)` in place of an average.
    Deviations: the order of the pivots, see `legacy`; the official code keeps 4 + 8 int(T / 8)
        tokens. Tokens keep their positions, which are counted from the row's first token where
        norms are taken, whatever padding stands before it.
    """

    image_pivots: int = 4
    text_pivots: int = 4
    legacy: bool = False
    legacy_start: int = 35

    title: ClassVar[str] = (
        "DART: of a few pivots, among image and text, keep the tokens that duplicate them least."
    )
    reads: ClassVar[str] = "keys, hidden states (with text)"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2502.11494"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise ValueError(
                f"image_pivots={self.image_pivots}, text_pivots={self.text_pivots}; pass at least 1"
                " and 0."
            )

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds(keys=(layer - 1,), text=True, normed=("final",))

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        if not isinstance(tokens, LayerTokens) or tokens.text_valid is None:
            raise ValueError(f"{self.name} reads inside the language model; give it LayerTokens.")
        self._check_unpadded(tokens)
        count, num_pivots = tokens.num_tokens, min(self.image_pivots, num_keep)
        image = descending(_norms(tokens.keys[layer - 1]), None)[:, :num_pivots]
        text = descending(_norms(tokens.text_keys[layer - 1]), tokens.text_valid)
        pivots = torch.cat([image, count + text[:, : self.text_pivots]], dim=1)  # [I, P]
        pivots = _set_order(pivots, self.legacy_start) if self.legacy else pivots.sort(dim=1).values
        real = torch.cat([tokens.real, tokens.text_valid], dim=1).gather(1, pivots).long()
        each = (num_keep - num_pivots) // real.sum(dim=1, keepdim=True)  # [I, 1]
        more = (num_keep - num_pivots) % real.sum(dim=1, keepdim=True)
        quotas = (each + (real.cumsum(dim=1) <= more)) * real  # [I, P]
        normed = torch.cat([tokens.normed["final"], tokens.text_normed["final"]], dim=1)
        directions = unit(normed)  # [I, N + M, D']
        taken = mask_of(image, count)
        for pivot, quota in zip(pivots.unbind(dim=1), quotas.unbind(dim=1), strict=True):
            cosine = row(directions, pivot)[:, :count]
            taken = taken | (ranks(descending(-cosine, ~taken)) < quota[:, None])
        return Selection(taken.sort(dim=1, descending=True, stable=True).indices[:, :num_keep])


def _norms(keys: Tensor) -> Tensor:
    """[I, N, D] -> [I, N], sums of absolute values."""
    return full(keys).abs().sum(dim=2)


def _set_order(pivots: Tensor, start: int) -> Tensor:
    """[I, P] in the order in which CPython lists a set of their columns."""
    orders = [list({start + pivot for pivot in image}) for image in pivots.tolist()]
    return torch.tensor(orders, device=pivots.device) - start
