"""The model with what is only there while it learns: the tower's own heads, and the losses.

H is the width of the language model here, Q the questions on an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ocvtp.data.drawing import COLOURS, SHAPES
from ocvtp.data.questions import SIZES
from tools.demo_vlm.batches import IGNORE, MAX_PER_SHAPE, Batch
from tools.demo_vlm.model import FEATURE_LAYER, build_model, orthogonal_attention
from tools.demo_vlm.reader import Reader
from tools.demo_vlm.settings import ModelSettings, StageSettings

_BACKGROUND_WEIGHT = 0.25
_KINDS_WEIGHT, _COUNTS_WEIGHT = 6.0, 0.3
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


class Learner(Reader):
    """The model while it is trained.

    Args:
        settings: sizes.
        tokenizer: of the model.
        seed: of the weights.
    """

    def __init__(self, settings: ModelSettings, tokenizer: Any, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            heads = TowerHeads(settings.tower_dim)
            noise = torch.randn(settings.text_dim, settings.tower_dim)
        super().__init__(build_model(settings, tokenizer, seed), tokenizer, noise)
        self.heads = heads
        self._names = names_of_patches(tokenizer)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> tokens [B, N, D] that the language model gets, and the CLS [B, D]."""
        out = self.model.model.vision_tower(pixel_values, output_hidden_states=True)
        return out.hidden_states[FEATURE_LAYER][:, 1:], out.pooler_output

    @torch.no_grad()
    def begin(self, stage: StageSettings, batch: Batch, generator: torch.Generator) -> None:
        """Prepare a stage, once: what the projector is learnt over, and fresh attention.

        Mean and deviation of the tokens are measured again; what a projector does that has learnt
        something stays the same.
        """
        if stage.align or stage.answer:
            self.fit(self.encode(batch.pixel_values)[0])
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
            embeddings = self.model.get_input_embeddings().weight
            terms["align"] = align_loss(visual, batch, embeddings, self._names)
        if stage.answer:
            if torch.rand(1, generator=generator).item() < stage.drop:
                visual = self.drop(features, visual, generator)
            terms["answer"] = self.answer_loss(visual, batch)
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


def names_of_patches(tokenizer: Any) -> dict[str, int]:
    """The numbers of the words that `align_loss` brings patches near to."""
    names = ("object", *SHAPES, *COLOURS, *SIZES)
    return {name: tokenizer.convert_tokens_to_ids(name) for name in names}


class Labels(Protocol):
    """What patches show: `shape`, `colour` and `size` [B, N] of a `Batch`."""

    @property
    def shape(self) -> Tensor: ...

    @property
    def colour(self) -> Tensor: ...

    @property
    def size(self) -> Tensor: ...


def align_loss(
    visual: Tensor, labels: Labels, embeddings: Tensor, words: Mapping[str, int]
) -> Tensor:
    """Cross-entropies of the words for a patch, by their products with its projection.

    Args:
        visual: [B, N, H] projected tokens. labels: of their patches.
        embeddings: [V, H] of words. words: numbers of `object` and of the names of all labels.
    """
    logits = F.rms_norm(visual, (visual.shape[-1],)) @ embeddings.T
    shown = labels.shape > 0
    total = F.binary_cross_entropy_with_logits(
        logits[..., words["object"]] - _OBJECT_BIAS, shown.to(logits.dtype)
    )
    shape = torch.where(shown, labels.shape - 1, IGNORE)
    for names, right in ((SHAPES, shape), (COLOURS, labels.colour), (SIZES, labels.size)):
        chosen = logits[..., [words[name] for name in names]]
        total = total + F.cross_entropy(chosen.flatten(0, 1), right.flatten(), ignore_index=IGNORE)
    return total
