from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ocvtp.ops.clustering import density_peaks, keep_in_clusters
from ocvtp.ops.merging import head_mean, keep_all
from ocvtp.ops.selection import ascending, descending, ranks, top_k
from ocvtp.pruners.base import NamedSettings, Pruner, Status
from ocvtp.pruners.budgets import StagePairs
from ocvtp.pruners.layer_pruner import LayerNeeds
from ocvtp.pruners.registry import register
from ocvtp.pruners.two_stage import FirstHalf, LaterHalf, inside, later_settings, needs_of, of_tower
from ocvtp.structures import Needs, Selection, Stage, VisualTokens

_PAPER = {192: (288, 0.18, 253, 51), 128: (230, 0.15, 165, 33), 64: (172, 0.12, 77, 15)}


@register("vitcop")
@dataclass(kw_only=True, eq=False)
class ViTCoP(Pruner):
    """ViTCoP: drop what the CLS passes over, merge clusters early and drop by key norm late.

    Paper: https://arxiv.org/abs/2601.17818.

    Before the language model int(.2 N + .9 K) tokens stay. Before layer 2 they are clustered
    by the tower's keys: of each cluster the tokens whose key is shortest stay, the others become
    one. Before layer 22 (of 32) a fifth of them stays, again those of the shortest keys.
    `select` on tokens outside of a language model keeps K by the first rule.

    Args:
        num_keep: tokens per image, on average over the layers: of 576 in 32 layers 192, 128 and 64
            are the paper's 288/253/51, 230/165/33 and 172/77/15, also `setting="paper-192"` etc.
        guidance: `cls` as in the paper; `received` for towers without a CLS.
        cluster_share: clusters per token; None for .09 + .27 K / N, the paper's .18, .15 and .12.
        block: of the tower; paper: 22 of 24, LLaVA's selected one.
        stages: `((layer, R), ...)` inside the language model; the first one merges clusters, and
            `num_keep` is then what stays before it. `cluster_share` is then .15.
    Deviations: unofficial where tokens are clustered, whose rule is not public: by DPC-kNN over
        head-mean keys. Quotas, merging and norms are the official code's. Keys are those of the
        layer before. Between the paper's settings its numbers are interpolated. A separator of
        LLaVA-NeXT is clustered with the token before it.
    """

    guidance: Literal["cls", "received"] = "cls"
    cluster_share: float | None = None
    block: int = -2
    stages: StagePairs | None = None

    title: ClassVar[str] = (
        "ViTCoP: drop what the CLS passes over, merge clusters early and drop by key norm late."
    )
    reads: ClassVar[str] = "attention (CLS), keys (both)"
    stage: ClassVar[Stage] = "llm_layers"
    status: ClassVar[Status] = "unofficial"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2601.17818"
    named_settings: ClassVar[NamedSettings] = {
        f"paper-{n}": {"num_keep": first, "cluster_share": share, "stages": ((2, r), (22, deep))}
        for n, (first, share, r, deep) in _PAPER.items()
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance not in ("cls", "received"):
            raise ValueError(f"guidance={self.guidance!r}; pass 'cls' or 'received'.")
        if self.cluster_share is not None and not 0 < self.cluster_share <= 1:
            raise ValueError(f"cluster_share={self.cluster_share}; pass a share, above 0 to 1.")
        self.parts  # noqa: B018 - checks the stages

    @property
    def parts(self) -> tuple[Pruner, ...]:
        settings = later_settings(self, self.stages, lambda ratio: 0.2 + 0.9 * ratio)
        later = ViTCoPLater(block=self.block, cluster_share=self.cluster_share, **settings)
        return FirstHalf(self, self._first), later

    @property
    def needs(self) -> Needs:
        return Needs(attention=((self.block, self.guidance),))

    @property
    def tower_needs(self) -> Needs:
        return needs_of(self.parts)

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        return top_k(tokens.attention[self.block, self.guidance], num_keep, tokens.valid)

    def _first(self, tokens: VisualTokens) -> Selection:
        """Counts are those of each image alone, whatever it is padded to."""
        num_keep = self.budget(tokens.num_tokens)
        if self.stages is not None:
            return self._select(tokens, num_keep)
        most = min((2 * tokens.num_tokens + 9 * num_keep) // 10, tokens.num_tokens)
        if tokens.valid is None:
            return self._select(tokens, most)
        real = tokens.valid.sum(dim=1, keepdim=True)  # [B, 1]
        wanted = real.new_full(real.shape, num_keep)
        if (ratio := self.keep_ratio) is not None:
            wanted = (real * ratio).round().long().clamp(min=1, max=self.max_keep)
        counts = (2 * real + 9 * wanted) // 10
        order = descending(tokens.attention[self.block, self.guidance], tokens.valid)
        chosen = tokens.valid & (ranks(order) < counts)
        return ascending(order[:, :most], chosen, tokens.num_tokens)


@dataclass(kw_only=True, eq=False)
class ViTCoPLater(LaterHalf):
    """Clusters first, then the shortest keys, see `ViTCoP`."""

    block: int
    cluster_share: float | None

    name: ClassVar[str] = "vitcop"
    status: ClassVar[Status] = "unofficial"
    merging: ClassVar[bool] = True
    proportions: ClassVar[tuple[int, ...]] = (5, 1)

    @property
    def tower_needs(self) -> Needs:
        return Needs(keys=(self.block,))

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds(keys=(layer - 1,))

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return 2, max(3, 22 * num_layers // 32)

    def _num_clusters(self, num_tokens: int) -> int:
        share, budget = self.cluster_share, self.keep_ratio
        count = self.max_keep if self.num_keep is None else self.num_keep
        if share is None and count is not None:  # N is .2 of all and .9 K
            own = count / max(num_tokens, 5 * num_tokens - 4.5 * count)
            budget = own if budget is None else min(own, budget)
        if share is None:
            share = 0.15 if budget is None else 0.09 + 0.27 * min(1.0, budget)
        return max(1, int(share * num_tokens))

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        if num_keep == tokens.num_tokens:
            return keep_all(tokens)
        lengths = head_mean(tokens.keys[layer - 1], tokens.num_heads).norm(dim=2)
        if layer != self._first_layer:
            return top_k(-lengths, num_keep)
        here, tower = inside(self, tokens)
        points = head_mean(of_tower(here, tower.keys[self.block]), tower.num_heads)
        count = self._num_clusters(tokens.num_tokens)
        return keep_in_clusters(density_peaks(points, count)[0], count, lengths, num_keep)
