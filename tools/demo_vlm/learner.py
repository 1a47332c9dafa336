"""The model with what is only there while it learns: the tower's own heads, and the losses.

H is the width of the language model here, Q the questions on an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ocvtp.data.drawing import COLOURS, SHAPES
from ocvtp.data.questions import SIZES
from tools.demo_vlm.batches import IGNORE, MAX_PER_SHAPE, Batch
from tools.demo_vlm.model import FEATURE_LAYER, build_model, orthogonal_attention
from tools.demo_vlm.packing import random_subset, read_packed
from tools.demo_vlm.processor import BEFORE_IMAGE
from tools.demo_vlm.settings import ModelSettings, StageSettings

_BACKGROUND_WEIGHT = 0.25
_KINDS_WEIGHT, _COUNTS_WEIGHT = 6.0, 0.3
_END_WEIGHT = 0.05
_OBJECT_BIAS = 2.0


class TowerHeads(nn.Module):
    """Linear readers of the tower: of every patch, and of the whole image from the CLS."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.patch = nn.Linear(dim, 1 + len(SHAPES) + len(COLOURS) + len(SIZES))
        self.kinds = nn.Linear(dim, len(SHAPES) * len(COLOURS) * len(SIZES))
        self.counts = nn.Linear(dim, len(SHAPES) * (MAX_PER_SHAPE + 1))

    def loss(self, features: Tensor, pooled: Tensor, batch: Batch) -> Tensor:
        """Cross-entropies of patches [B, N, D] and of the CLS [B, D].

        The background of a scene is most of it, so it weighs less.
        """
        logits = self.patch(self.norm(features)).flatten(0, 1)
        shape, colour, size = logits.split([1 + len(SHAPES), len(COLOURS), len(SIZES)], dim=1)
        weight = torch.ones(1 + len(SHAPES), device=shape.device)
        weight[0] = _BACKGROUND_WEIGHT
        counts = self.counts(pooled).reshape(-1, MAX_PER_SHAPE + 1)
        return (
            F.cross_entropy(shape, batch.shape.flatten(), weight)
            + F.cross_entropy(colour, batch.colour.flatten(), ignore_index=IGNORE)
            + F.cross_entropy(size, batch.size.flatten(), ignore_index=IGNORE)
            + _KINDS_WEIGHT
            * F.binary_cross_entropy_with_logits(self.kinds(pooled), batch.kinds.to(pooled.dtype))
            + _COUNTS_WEIGHT * F.cross_entropy(counts, batch.counts.flatten())
        )


class Learner(nn.Module):
    """The model while it is trained.

    Tokens of a tower share a large mean and differ in scale, so the projector's first layer is
    learnt over standardised ones: `weight`, `bias`, with `mean` and `std` of the features. `fold`
    writes it into the model.

    Args:
        settings: sizes.
        tokenizer: of the model.
        seed: of the weights.
    """

    mean: Tensor
    std: Tensor
    fitted: Tensor
    before: Tensor

    def __init__(self, settings: ModelSettings, tokenizer: Any, seed: int) -> None:
        super().__init__()
        self.model = build_model(settings, tokenizer, seed)
        first = self.model.model.multi_modal_projector.linear_1.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.heads = TowerHeads(settings.tower_dim)
            noise = torch.randn(first.weight.shape)
        self.weight = nn.Parameter(noise * settings.tower_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(settings.text_dim))
        self.register_buffer("mean", torch.zeros(settings.tower_dim))
        self.register_buffer("std", torch.ones(settings.tower_dim))
        self.register_buffer("fitted", torch.tensor(False))
        before = tokenizer(BEFORE_IMAGE, add_special_tokens=False)["input_ids"]
        self.register_buffer("before", torch.tensor(before), persistent=False)
        self._end = tokenizer.eos_token_id
        self._words = {
            word: tokenizer.convert_tokens_to_ids(word)
            for word in ("object", *SHAPES, *COLOURS, *SIZES)
        }

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> tokens [B, N, D] that the language model gets, and the CLS [B, D]."""
        out = self.model.model.vision_tower(pixel_values, output_hidden_states=True)
        return out.hidden_states[FEATURE_LAYER][:, 1:], out.pooler_output

    def project(self, features: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, H]."""
        projector = self.model.model.multi_modal_projector
        hidden = F.linear(self.standardise(features), self.weight, self.bias)
        return torch.as_tensor(projector.linear_2(projector.act(hidden)))

    def standardise(self, features: Tensor) -> Tensor:
        """[B, N, D] of mean 0 and deviation 1."""
        return (features - self.mean) / self.std

    @torch.no_grad()
    def fold(self) -> None:
        """Write the projector's first layer, over raw tokens, into the model."""
        first = self.model.model.multi_modal_projector.linear_1
        first.weight.copy_(self.weight / self.std)
        first.bias.copy_(self.bias - first.weight @ self.mean)

    @torch.no_grad()
    def begin(self, stage: StageSettings, batch: Batch, generator: torch.Generator) -> None:
        """Prepare a stage, once: what the projector is learnt over, and fresh attention.

        Mean and deviation of the tokens are measured again; what a projector does that has learnt
        something stays the same.
        """
        if stage.align or stage.answer:
            features, _ = self.encode(batch.pixel_values)
            mean, std = features.mean((0, 1)), features.std((0, 1)) + 1e-2
            if self.fitted:
                raw = self.weight / self.std
                self.bias.add_(raw @ (mean - self.mean))
                self.weight.copy_(raw * std)
            self.mean.copy_(mean)
            self.std.copy_(std)
            self.fitted.fill_(True)
        if stage.fresh_attention:
            orthogonal_attention(self.model, generator)

    def loss(
        self, stage: StageSettings, batch: Batch, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The terms of a stage, without their weights."""
        with torch.set_grad_enabled(stage.tower_learning_rate > 0):
            features, pooled = self.encode(batch.pixel_values)
        terms = {}
        if stage.dense:
            terms["dense"] = self.heads.loss(features, pooled, batch)
        if stage.align or stage.answer:
            visual = self.project(features)
        if stage.align:
            terms["align"] = self._align(visual, batch)
        if stage.answer:
            if torch.rand(1, generator=generator).item() < stage.drop:
                keep = random_subset(self.standardise(features), generator)
                visual = visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[2]))
            logits, ends = self.answer(visual, batch)
            end = torch.full_like(batch.answer, self._end).flatten()
            terms["answer"] = F.cross_entropy(logits.flatten(0, 1), batch.answer.flatten())
            terms["answer"] = terms["answer"] + _END_WEIGHT * F.cross_entropy(
                ends.flatten(0, 1), end
            )
        return terms

    @torch.no_grad()
    def scores(self, stage: StageSettings, batch: Batch) -> dict[str, Tensor]:
        """Whether the tower's heads name the shape of each patch, and whether answers are right.

        Returns:
            `patches` [objects' patches] and `answers` [B, Q], bool, where the stage learns them.
        """
        features, _ = self.encode(batch.pixel_values)
        scores = {}
        if stage.dense:
            shape = self.heads.patch(self.heads.norm(features))[..., : 1 + len(SHAPES)]
            scores["patches"] = (shape.argmax(-1) == batch.shape)[batch.shape > 0]
        if stage.answer:
            logits, _ = self.answer(self.project(features), batch)
            scores["answers"] = logits.argmax(-1) == batch.answer
        return scores

    def answer(self, visual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B, Q, words] logits of the answer, and of what follows it."""
        hidden = read_packed(self.model, self.before, visual, batch.words)
        at = batch.answer_at[..., None, None].expand(-1, -1, 1, hidden.shape[-1])
        asked, answered = hidden.gather(2, at - 1), hidden.gather(2, at)
        return self.model.lm_head(asked[:, :, 0]), self.model.lm_head(answered[:, :, 0])

    def _align(self, visual: Tensor, batch: Batch) -> Tensor:
        """Cross-entropies of the words for a patch, by their products with its projection."""
        embeddings = self.model.get_input_embeddings().weight
        logits = F.rms_norm(visual, (visual.shape[-1],)) @ embeddings.T
        shown = batch.shape > 0
        total = F.binary_cross_entropy_with_logits(
            logits[..., self._words["object"]] - _OBJECT_BIAS, shown.to(logits.dtype)
        )
        shape = torch.where(shown, batch.shape - 1, IGNORE)
        for names, labels in ((SHAPES, shape), (COLOURS, batch.colour), (SIZES, batch.size)):
            chosen = logits[..., [self._words[name] for name in names]]
            total = total + F.cross_entropy(
                chosen.flatten(0, 1), labels.flatten(), ignore_index=IGNORE
            )
        return total
