"""A scorer that reads the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocvtp.selectors.blocks import (
    Attention,
    Budget,
    Film,
    GatedMLP,
    check_budget,
    check_heads,
    check_sizes,
    real_mean,
    sinusoids,
    standardised,
    token_fractions,
)
from ocvtp.selectors.budgets import NumKeep
from ocvtp.selectors.scorer import Scorer, Scores, Widths, register_scorer
from ocvtp.slots.statistics import FeatureStatistics
from ocvtp.structures import Needs, VisualTokens


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, text: bool) -> None:
        super().__init__()
        self.norm_image, self.look = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_asked = nn.LayerNorm(dim) if text else None
        self.ask = Attention(dim, heads) if text else None
        self.gate = nn.Parameter(torch.ones(dim)) if text else None
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), GatedMLP(dim, 2 * dim)

    def forward(
        self, image: Tensor, valid: Tensor | None, prompt: Tensor | None, said: Tensor | None
    ) -> Tensor:
        normed = self.norm_image(image)
        image = image + self.look(normed, normed, valid)
        if self.ask is not None:
            assert prompt is not None
            assert self.gate is not None
            assert self.norm_asked is not None
            read = self.ask(self.norm_asked(image), prompt, said)
            image = image + self.gate.tanh() * read
        mixed: Tensor = image + self.mlp(self.norm_mlp(image))
        return mixed


@register_scorer("prompted")
@dataclass(eq=False)
class Prompted(Scorer):
    """Blocks of attention among an image's tokens, and from these to the prompt.

    Image and prompt are reduced to `dim` by one linear map, the image standardised by the training
    images, the prompt each token by itself. The prompt is read by gated cross-attention in each
    block, and its mean once more before the score. Built after the descriptions of CoViPAL
    (https://arxiv.org/abs/2508.17243) and of EvoComp (https://arxiv.org/abs/2604.17087).

    Args:
        dim: h; a multiple of 4, and of the heads.
        blocks: how many.
        heads: of attention.
        text: whether the prompt is read.
        budget: see `ocvtp.selectors.blocks.Budget`.

    Raises:
        ValueError: for sizes below 1, a `dim` that does not fit, and an unknown `budget`.
    """

    dim: int = 512
    blocks: int = 4
    heads: int = 8
    text: bool = True
    budget: Budget = "none"

    def __post_init__(self) -> None:
        check_sizes(dim=self.dim, blocks=self.blocks, heads=self.heads)
        check_heads(self.dim, self.heads)
        check_heads(self.dim, 1, 4)
        check_budget(self.budget)

    @property
    def needs(self) -> Needs:
        return Needs(projected=True, text=self.text)

    def build(self, widths: Widths) -> None:
        self.inputs = FeatureStatistics(widths.projected)
        self.reduce = nn.Linear(widths.projected, self.dim)
        self.kinds = nn.Parameter(torch.zeros(2, self.dim))  # of an image, of a prompt
        self.film = Film(self.dim) if self.budget == "film" else None
        self.layers = nn.ModuleList(
            _Block(self.dim, self.heads, self.text) for _ in range(self.blocks)
        )
        self.nothing = nn.Parameter(torch.zeros(1, 1, self.dim)) if self.text else None
        self.gist = nn.Linear(self.dim, self.dim) if self.text else None
        self.norm = nn.LayerNorm(self.dim)
        self.out = nn.Linear(self.dim, 1)

    def forward(self, tokens: VisualTokens, num_keep: NumKeep | None = None) -> Scores:
        assert tokens.projected is not None
        image = self.reduce(standardised(self.inputs, tokens.projected, tokens.valid))
        image = image + self.kinds[0]
        if (places := token_fractions(tokens)) is not None:
            image = image + sinusoids(places, self.dim).to(image.dtype)
        if self.film is not None:
            image = self.film(image, tokens, num_keep)
        prompt, said = self._prompt(tokens) if self.text else (None, None)
        for block in self.layers:
            image = block(image, tokens.valid, prompt, said)
        if self.gist is not None:
            assert prompt is not None
            image = image + self.gist(real_mean(prompt, said))
        values: Tensor = self.out(self.norm(image)).squeeze(2)
        return Scores(values.float())

    def statistics(self) -> list[tuple[int | str, FeatureStatistics]]:
        return [("projected", self.inputs)]

    def _prompt(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """[B, 1 + M, h] and which are there: the first is, so that a prompt may be empty."""
        assert tokens.text is not None
        assert self.nothing is not None
        text, said = tokens.text.to(self.reduce.weight.dtype), tokens.text_valid
        if said is None:
            said = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        text = functional.layer_norm(text.masked_fill(~said[:, :, None], 0.0), text.shape[2:])
        words = self.reduce(text) + self.kinds[1]
        nothing = self.nothing.expand(len(words), -1, -1)
        return torch.cat([nothing, words], dim=1), functional.pad(said, (1, 0), value=True)
