"""Projector and language model while they learn from tokens that are on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo_vlm.model import orthogonal_attention
from tools.demo_vlm.reader import Reader
from tools.photo_vlm.batches import Batch
from tools.photo_vlm.model import build_model
from tools.photo_vlm.questions import plural
from tools.photo_vlm.settings import PhotoStage, ReaderSettings

_BACKGROUND_WEIGHT = 0.25
_TOWER = "vision_tower."


class Learner(Reader):
    """The model while it is trained; its tower is never read.

    Args:
        vision: `Dinov2Config` of the tower.
        settings: sizes.
        tokenizer: of the model.
        categories: that are asked for.
        seed: of the weights.
    """

    def __init__(
        self,
        vision: Any,
        settings: ReaderSettings,
        tokenizer: Any,
        categories: Sequence[str],
        seed: int,
    ) -> None:
        model = build_model(vision, settings, tokenizer, seed)
        model.model.vision_tower.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed + 1)
        noise = torch.randn(settings.text_dim, vision.hidden_size, generator=generator)
        super().__init__(model, tokenizer, noise)
        names = [[name, plural(name)] for name in categories]
        self._names = [
            [tokenizer(name, add_special_tokens=False)["input_ids"] for name in pair]
            for pair in names
        ]

    def reader_state(self) -> dict[str, Tensor]:
        """The state without the tower, which does not change."""
        return {name: v for name, v in self.state_dict().items() if _TOWER not in name}

    def load_reader(self, state: dict[str, Tensor]) -> None:
        """Take a `reader_state`."""
        tower = {name: v for name, v in self.state_dict().items() if _TOWER in name}
        self.load_state_dict({**tower, **state})

    def begin(self, stage: PhotoStage, batch: Batch, generator: torch.Generator) -> None:
        """Prepare a stage, once: what the projector is learnt over, and fresh attention."""
        self.fit(batch.features)
        if stage.fresh_attention:
            orthogonal_attention(self.model, generator)

    def loss(
        self, stage: PhotoStage, batch: Batch, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The terms of a stage, without their weights."""
        visual = self.project(batch.features)
        terms = {}
        if stage.align:
            terms["align"] = self._align(visual, batch.patches)
        if stage.answer:
            if torch.rand(1, generator=generator).item() < stage.drop:
                visual = self.drop(batch.features, visual, generator)
            elif stage.spotlight:
                keep = spotlight(batch.patches, stage.spotlight, generator)
                visual = visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[2]))
            terms["answer"] = self.answer_loss(visual, batch)
        return terms

    def word_logits(self, visual: Tensor, plurals: bool) -> Tensor:
        """[B, N, H] -> [B, N, 1 + C]: how near a patch is to nothing and to every category."""
        embeddings = self.model.get_input_embeddings().weight
        rows = [embeddings[pair[plurals]].mean(0) for pair in self._names]
        logits = F.rms_norm(visual, (visual.shape[-1],)) @ torch.stack(rows).T
        return torch.cat([torch.zeros_like(logits[..., :1]), logits], dim=-1)

    def _align(self, visual: Tensor, patches: Tensor) -> Tensor:
        """Cross-entropies of the words, one and many, for what covers each patch."""
        weight = torch.ones(1 + len(self._names), device=visual.device)
        weight[0] = _BACKGROUND_WEIGHT
        found = [self.word_logits(visual, plurals).flatten(0, 1) for plurals in (False, True)]
        terms = [F.cross_entropy(logits, patches.flatten(), weight) for logits in found]
        return torch.stack(terms).mean()


def spotlight(patches: Tensor, num_keep: int, generator: torch.Generator) -> Tensor:
    """Which tokens are read: those on objects first, others at random.

    Args:
        patches: [B, N] 0 for background. num_keep: K; all where there are fewer.
        generator: of a CPU.

    Returns:
        [B, K] ascending.
    """
    noise = torch.rand(patches.shape, generator=generator).to(patches.device)
    best = (noise + (patches > 0)).topk(min(num_keep, patches.shape[1]), dim=1)
    return best.indices.sort(dim=1).values
