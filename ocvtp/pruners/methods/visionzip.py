from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ocvtp.ops.merging import contextual_share, dominant_and_contextual, head_mean
from ocvtp.pruners.base import NamedSettings, Pruner, Status
from ocvtp.pruners.budgets import check_count
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("visionzip")
@dataclass(kw_only=True, eq=False)
class VisionZip(Pruner):
    """VisionZip: keep the CLS and the tokens it attends to, and merge the rest into a few.

    Paper: https://arxiv.org/abs/2412.04467, section 3.

    Args:
        num_keep: tokens kept per image, the CLS included; paper: 192, 128 or 64 of 576, also as
            `setting="paper-192"` etc. With `budget="per_tile"` `paper-128`, `paper-64` and
            `paper-32` are its 640, 320 and 160 of LLaVA-NeXT.
        num_contextual: merged tokens among them; None for the paper's share of 10 / 64.
        guidance: `cls` as in the paper; `received` for towers without a CLS, which then has no
            row of its own.
        block: block of the tower that is read; paper: 22 of 24, LLaVA's selected one.
    Deviations: none.
    """

    num_contextual: int | None = None
    guidance: Literal["cls", "received"] = "cls"
    block: int = -2

    title: ClassVar[str] = (
        "VisionZip: keep the CLS and the tokens it attends to, and merge the rest into a few."
    )
    reads: ClassVar[str] = "attention (CLS), keys, CLS"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2412.04467"
    merging: ClassVar[bool] = True
    named_settings: ClassVar[NamedSettings] = {
        f"paper-{n}": {"num_keep": n, "num_contextual": merged}
        for n, merged in ((192, 30), (128, 20), (64, 10), (32, 5))
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_contextual is not None:
            self.num_contextual = check_count("num_contextual", self.num_contextual, least=0)
        if self.guidance not in ("cls", "received"):
            raise ValueError(f"guidance={self.guidance!r}; pass 'cls' or 'received'.")

    @property
    def needs(self) -> Needs:
        attention = ((self.block, self.guidance),)
        return Needs(attention=attention, keys=(self.block,), cls=self.guidance == "cls")

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        with_cls = self.guidance == "cls"
        contextual = contextual_share(self.num_contextual, 10 / 64, num_keep, num_keep - with_cls)
        return dominant_and_contextual(
            tokens.attention[self.block, self.guidance],
            head_mean(tokens.keys[self.block], tokens.num_heads),
            num_dominant=num_keep - with_cls - contextual,
            num_contextual=contextual,
            with_cls=with_cls,
            valid=tokens.valid,
        )
