from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ocvtp.ops.merging import contextual_share, dominant_and_contextual, head_mean, keep_all
from ocvtp.pruners.base import NamedSettings, Pruner, Status
from ocvtp.pruners.budgets import StagePairs, check_count
from ocvtp.pruners.layer_pruner import LayerNeeds
from ocvtp.pruners.registry import register
from ocvtp.pruners.two_stage import FirstHalf, LaterHalf, later_settings
from ocvtp.structures import Needs, Selection, VisualTokens


@register("visiondrop")
@dataclass(kw_only=True, eq=False)
class VisionDrop(Pruner):
    """VisionDrop: keep the tokens that all others attend to, and merge the rest into a few.

    Paper: https://arxiv.org/abs/2506.22283, section 3.

    With `later`, tokens are dropped and merged in the same way at each quarter of the language
    model's layers, by the attention that an image's tokens receive of each other there.

    Args:
        num_keep: tokens kept per image before the language model. With `later` their average over
            its layers: K = 32 of 576 is the paper's 42 + 6 before it, and 30 + 5, 22 + 4 and 16 + 3
            before layers 8, 16 and 24 of 32, also as `setting="paper-32"`; others are in
            proportion.
        num_contextual: merged tokens among those before the language model; None for the paper's
            share of 6 / 48.
        block: block of the tower that is read; paper: 22 of 24, LLaVA's selected one.
        later: whether the stages inside the language model are part of it.
        stages: `((layer, K), ...)` of these in place of an average; `num_keep` is then what stays
            before them.
    Deviations: which layer's attention and keys the later stages read is not sure: here those of
        the layer before, keys turned by their positions; and that merged tokens stand after the
        others and all are numbered again. The first stage alone is the default.
    """

    num_contextual: int | None = None
    block: int = -2
    later: bool = False
    stages: StagePairs | None = None

    title: ClassVar[str] = (
        "VisionDrop: keep the tokens that all others attend to, and merge the rest into a few."
    )
    reads: ClassVar[str] = "attention (received), keys"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2506.22283"
    merging: ClassVar[bool] = True
    named_settings: ClassVar[NamedSettings] = {
        "paper-32": {"later": True, "num_keep": 48, "stages": ((8, 35), (16, 26), (24, 19))}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_contextual is not None:
            self.num_contextual = check_count("num_contextual", self.num_contextual, least=0)
        if self.stages is not None and not self.later:
            raise ValueError(f"stages={self.stages!r} are those inside; pass later=True with them.")
        self.parts  # noqa: B018 - checks the stages

    @property
    def parts(self) -> tuple[Pruner, ...]:
        if not self.later:
            return (self,)
        later = VisionDropLater(**later_settings(self, self.stages, lambda ratio: 1.5 * ratio))
        return FirstHalf(self, before=self._before), later

    @property
    def needs(self) -> Needs:
        return Needs(attention=((self.block, "received"),), keys=(self.block,))

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        contextual = contextual_share(self.num_contextual, 6 / 48, num_keep, num_keep)
        return dominant_and_contextual(
            tokens.attention[self.block, "received"],
            head_mean(tokens.keys[self.block], tokens.num_heads),
            num_dominant=num_keep - contextual,
            num_contextual=contextual,
            with_cls=False,
            valid=tokens.valid,
        )

    def _before(self, num_keep: int) -> int:
        """Tokens that stay before the language model, for a budget of K."""
        return num_keep if self.stages is not None else round(1.5 * num_keep)


_CONTEXTUAL = 0.135  # of 35, 26 and 19: 5, 4 and 3


@dataclass(kw_only=True, eq=False)
class VisionDropLater(LaterHalf):
    """Dominant and contextual tokens again, see `VisionDrop`."""

    name: ClassVar[str] = "visiondrop"
    status: ClassVar[Status] = "official"
    merging: ClassVar[bool] = True
    positions: ClassVar[Literal["contiguous", "original"]] = "contiguous"
    proportions: ClassVar[tuple[int, ...]] = (35, 26, 19)

    def needs_at(self, layer: int) -> LayerNeeds:
        return LayerNeeds(attention=((layer - 1, "visual"),), keys=(layer - 1,))

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        return num_layers // 4, num_layers // 2, 3 * num_layers // 4

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        if num_keep == tokens.num_tokens:
            return keep_all(tokens)
        contextual = contextual_share(None, _CONTEXTUAL, num_keep, num_keep)
        return dominant_and_contextual(
            tokens.attention[layer - 1, "visual"],
            head_mean(tokens.keys[layer - 1], tokens.num_heads),
            num_dominant=num_keep - contextual,
            num_contextual=contextual,
            with_cls=False,
            valid=None,
        )
