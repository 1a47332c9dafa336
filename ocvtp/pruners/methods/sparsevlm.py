from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ocvtp.ops.clustering import density_peaks
from ocvtp.ops.merging import merge_rows, merged
from ocvtp.ops.selection import descending
from ocvtp.ops.similarity import full
from ocvtp.pruners.base import NamedSettings, Status
from ocvtp.pruners.layer_pruner import LayerNeeds, LayerPruner, LayerStage, to_average
from ocvtp.pruners.registry import register
from ocvtp.structures import LayerTokens, Selection, VisualTokens, take

_LAYERS = (3, 7, 16)
_LEFT = {  # recycled ones included
    "paper": {192: (309, 204, 113), 128: (312, 117, 39), 64: (82, 32, 18)},
    "plus": {192: (300, 200, 118), 128: (238, 108, 60), 64: (66, 34, 20)},
}


@register("sparsevlm")
@dataclass(kw_only=True, eq=False)
class SparseVLM(LayerPruner):
    """SparseVLM: keep what the relevant words attend to in three stages, recycle some of the rest.

    Paper: https://arxiv.org/abs/2410.04417, v1.5; `plus` is SparseVLM+ (v2.0).

    Raters are the text tokens that get more than the mean share of the image's softmax over the
    text after it, of input embeddings. After layers 2, 6 and 15 the tokens that they attend to
    most stay. Of the dropped ones the best .3 are clustered; the means stand after what is kept.
    What the paper calls 192, 128 and 64 tokens is `setting="paper-192"` etc., 206.5, 145.4 and 82.3
    on average over 32 layers; `plus-192` etc. are SparseVLM+'s: 206.8, 144.1 and 81.8.

    Args:
        num_keep: tokens per image, recycled ones too, on average; in the nearest one's proportions.
        plus: whether tokens keep their positions and none is recycled.
        stages: `((layer, T), ...)` in place of an average; T counts recycled tokens too.
    Deviations: no noise of 1e-6 on the densities: of equals the first counts as the denser. If no
        more tokens are there than may stay, all stay (there one is dropped). If no word is above
        the mean, all are raters. The paper's rule that finds counts from a rank is left out.
    """

    plus: bool = False

    title: ClassVar[str] = (
        "SparseVLM: keep what the relevant words attend to in three stages, recycle some of the"
        " rest."
    )
    reads: ClassVar[str] = "attention (raters among the text)"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2410.04417"
    merging: ClassVar[bool] = True
    named_settings: ClassVar[NamedSettings] = {
        f"{kind}-{n}": {"plus": kind == "plus", "stages": tuple(zip(_LAYERS, left, strict=True))}
        for kind, table in _LEFT.items()
        for n, left in table.items()
    }

    @property
    def positions(self) -> Literal["contiguous", "original"]:
        return "original" if self.plus else "contiguous"

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds(attention=((layer - 1, "text"),))

    def raters(self, tokens: LayerTokens) -> Tensor:
        """[I, M] bool, the words that the image points to more than to the mean word."""
        assert tokens.text is not None
        assert tokens.text_valid is not None
        logits = full(tokens.features) @ full(tokens.text).transpose(1, 2)  # [I, N, M]
        logits = logits.masked_fill(~tokens.text_valid[:, None], float("-inf"))
        share = logits.softmax(dim=2).mean(dim=1)  # [I, M]
        chosen = share > 1 / tokens.text_valid.sum(dim=1, keepdim=True)
        return torch.where(chosen.any(dim=1, keepdim=True), chosen, tokens.text_valid)

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return _LAYERS

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        table, average = _LEFT["plus" if self.plus else "paper"], self._average(num_tokens)
        nearest = min(table, key=lambda n: abs(n / 576 - average / num_tokens))
        return to_average(_LAYERS, table[nearest], num_layers, num_tokens, average)

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        self._check_unpadded(tokens)
        num_kept = num_keep if self.plus else _without_recycled(num_keep, tokens.num_tokens)
        order = descending(tokens.attention[layer - 1, "text"], None)
        kept = order[:, :num_kept].sort(dim=1).values
        if num_kept == num_keep:
            return Selection(kept)
        spare = order[:, num_kept : num_kept + num_recycled(tokens.num_tokens - num_kept)[0]]
        clusters, centres = density_peaks(take(tokens.features, spare), num_keep - num_kept)
        row_of = torch.full_like(order, num_keep)
        rows = torch.arange(num_kept, device=order.device).expand_as(kept)
        row_of = row_of.scatter(1, kept, rows).scatter(1, spare, num_kept + clusters)
        share = 1 / (clusters[:, :, None] == clusters[:, None]).sum(dim=2)  # [I, n]
        weights = torch.ones_like(order, dtype=share.dtype).scatter(1, spare, share)
        anchors = torch.cat([kept, take(spare, centres)], dim=1)
        return merged(merge_rows(row_of, weights, num_keep), anchors)


def num_recycled(num_dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are recycled, and into how many clusters."""
    recycled = int(num_dropped * 0.3) + 1 if num_dropped else 0
    return recycled, int(recycled / 10) + 1 if num_dropped else 0


def _without_recycled(total: int, num_tokens: int) -> int:
    """How many of `total` tokens that stay are kept as they are: most that can be, at least 1."""
    kept = total
    while kept > 1 and kept + num_recycled(num_tokens - kept)[1] > total:
        kept -= 1
    return kept
