"""Projector and language model while they learn, whatever tower their tokens come from.

H is the width of the language model here, D that of the tower, N the patches, Q the questions on an
image.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.demo_vlm.packing import random_subset, read_packed
from tools.demo_vlm.processor import BEFORE_IMAGE

_END_WEIGHT = 0.05


class Asked(Protocol):
    """The questions of a batch.

    `words` [B, Q, L] are the token numbers of question and answer, padded; `answer_at` [B, Q] is
    the position of the answer in them and `answer` [B, Q] its token number.
    """

    @property
    def words(self) -> Tensor: ...

    @property
    def answer_at(self) -> Tensor: ...

    @property
    def answer(self) -> Tensor: ...


class Reader(nn.Module):
    """A LLaVA whose projector and language model are trained.

    Tokens of a tower share a large mean and differ in scale, so the projector's first layer is
    learnt over standardised ones: `weight`, `bias`, with `mean` and `std` of the features. `fold`
    writes it into the model.

    Args:
        model: a LlavaForConditionalGeneration.
        tokenizer: of the model.
        noise: [H, D] normal random numbers, of which the first layer is made.
    """

    mean: Tensor
    std: Tensor
    fitted: Tensor
    before: Tensor

    def __init__(self, model: Any, tokenizer: Any, noise: Tensor) -> None:
        super().__init__()
        self.model = model
        self.model.model.multi_modal_projector.linear_1.requires_grad_(False)
        text_dim, tower_dim = noise.shape
        self.weight = nn.Parameter(noise * tower_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(text_dim))
        self.register_buffer("mean", torch.zeros(tower_dim))
        self.register_buffer("std", torch.ones(tower_dim))
        self.register_buffer("fitted", torch.tensor(False))
        before = tokenizer(BEFORE_IMAGE, add_special_tokens=False)["input_ids"]
        self.register_buffer("before", torch.tensor(before), persistent=False)
        self._end = tokenizer.eos_token_id

    def project(self, features: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, H]."""
        projector = self.model.model.multi_modal_projector
        hidden = F.linear(self.standardise(features), self.weight, self.bias)
        return torch.as_tensor(projector.linear_2(projector.act(hidden)))

    def standardise(self, features: Tensor) -> Tensor:
        """[B, N, D] of mean 0 and deviation 1."""
        return (features - self.mean) / self.std

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Measure mean and deviation of tokens, [B, N, D].

        What a projector does that has learnt something stays the same.
        """
        mean, std = features.mean((0, 1)), features.std((0, 1)) + 1e-2
        if self.fitted:
            raw = self.weight / self.std
            self.bias.add_(raw @ (mean - self.mean))
            self.weight.copy_(raw * std)
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.fitted.fill_(True)

    @torch.no_grad()
    def fold(self) -> None:
        """Write the projector's first layer, over raw tokens, into the model."""
        first = self.model.model.multi_modal_projector.linear_1
        first.weight.copy_(self.weight / self.std)
        first.bias.copy_(self.bias - first.weight @ self.mean)

    def drop(self, features: Tensor, visual: Tensor, generator: torch.Generator) -> Tensor:
        """[B, K, H] a random part of the projected tokens [B, N, H], see `random_subset`."""
        keep = random_subset(self.standardise(features), generator)
        return visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[2]))

    def answer(self, visual: Tensor, batch: Asked) -> tuple[Tensor, Tensor]:
        """[B, Q, words] logits of the answer, and of what follows it."""
        hidden = read_packed(self.model, self.before, visual, batch.words)
        at = batch.answer_at[..., None, None].expand(-1, -1, 1, hidden.shape[-1])
        asked, answered = hidden.gather(2, at - 1), hidden.gather(2, at)
        return self.model.lm_head(asked[:, :, 0]), self.model.lm_head(answered[:, :, 0])

    def answer_loss(self, visual: Tensor, batch: Asked) -> Tensor:
        """Cross-entropy of the answers, and a little of the end after each."""
        logits, ends = self.answer(visual, batch)
        end = torch.full_like(batch.answer, self._end).flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), batch.answer.flatten())
        return loss + _END_WEIGHT * F.cross_entropy(ends.flatten(0, 1), end)
