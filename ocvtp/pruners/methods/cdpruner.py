from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ocvtp.ops.diversity import dpp_map
from ocvtp.ops.prompt_text import clip_parts
from ocvtp.ops.selection import ascending
from ocvtp.ops.similarity import pairs_pay, unit
from ocvtp.pruners.base import NamedSettings, Pruner, Status
from ocvtp.pruners.registry import register
from ocvtp.structures import Needs, Selection, VisualTokens


@register("cdpruner")
@dataclass(kw_only=True, eq=False)
class CDPruner(Pruner):
    """CDPruner: keep a diverse set of tokens by a determinantal process under the prompt.

    Paper: https://arxiv.org/abs/2506.10967, section 3.

    Args:
        num_keep: tokens kept per image; paper: 192, 128, 64 or 32 of 576, also as
            `setting="paper-192"` etc.
        nearest: prefer the tokens nearest to the prompt; the official code reverses the sign,
            because patches of OpenAI's CLIP lie opposite to the text that they show. Not all do.
    Deviations: relevance is scaled to 0..1 over each image; the official code scales it over the
        batch, so that an image's tokens depend on its neighbours. Constant relevance counts as 1,
        and beyond the rank of the kernel tokens are kept by relevance; theirs gives NaN.
    """

    nearest: bool = False

    title: ClassVar[str] = (
        "CDPruner: keep a diverse set of tokens by a determinantal process under the prompt."
    )
    reads: ClassVar[str] = "projected, clip"
    status: ClassVar[Status] = "official"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2506.10967"
    named_settings: ClassVar[NamedSettings] = {
        f"paper-{n}": {"num_keep": n} for n in (192, 128, 64, 32)
    }

    @property
    def needs(self) -> Needs:
        return Needs(projected=True, clip=True)

    def _takes_turns(self, num_tokens: int, num_keep: int) -> bool:
        return not pairs_pay(num_tokens, num_keep)

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        assert tokens.projected is not None
        relevance = _relevance(tokens, self.nearest)
        picks = dpp_map(tokens.projected, relevance, num_keep, tokens.valid)
        return ascending(picks, tokens.valid, tokens.num_tokens)


def _relevance(tokens: VisualTokens, nearest: bool) -> Tensor:
    """[B, N] how much the parts of the prompt ask for each token, scaled to 0..1 over the image.

    That is the mean cosine, its sign reversed unless `nearest`.
    """
    assert tokens.clip_visual is not None
    cosine = unit(tokens.clip_visual) @ unit(clip_parts(tokens)).transpose(1, 2)  # [B, N, T]
    if tokens.clip_text_valid is None:
        related = cosine.mean(dim=2)
    else:
        real = tokens.clip_text_valid[:, None]
        related = (cosine * real).sum(dim=2) / real.sum(dim=2).clamp(min=1)
    related = related if nearest else -related
    low, high = related, related
    if tokens.valid is not None:
        low = related.masked_fill(~tokens.valid, float("inf"))
        high = related.masked_fill(~tokens.valid, float("-inf"))
    smallest = low.amin(dim=1, keepdim=True)
    extent = high.amax(dim=1, keepdim=True) - smallest
    flat = extent <= 0
    scaled = (related - smallest + 1e-6) / extent.masked_fill(flat, 1.0)
    scaled = scaled.masked_fill(flat, 1.0)
    return scaled if tokens.valid is None else scaled.masked_fill(~tokens.valid, 0.0)
