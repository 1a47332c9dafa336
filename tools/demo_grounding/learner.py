"""The demo VLM while it learns boxes: first its tower, then projector and language model.

B prompts, I images in each of N tokens, H width of the language model.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.demo_grounding.batches import Batch, TowerBatch
from tools.demo_grounding.conversations import coordinates
from tools.demo_vlm.batches import IGNORE
from tools.demo_vlm.model import FEATURE_LAYER
from tools.demo_vlm.packing import random_subset, read_packed
from tools.demo_vlm.reader import Reader

_END_WEIGHT = 0.1
_PLACE = 3.0  # how far apart the edges of the image are in the position embedding, halved
_NEAR = 0.1  # weight of what the tower was
_BLUR = 1.0  # standard deviation of what counts as right of a coordinate, in steps of coordinates
_WAVES = 6  # of the new words for coordinates, which begin as neighbours
_NEW_STD = 0.06


class GroundingReader(Reader):
    """The demo VLM with new words.

    Args:
        model: a LlavaForConditionalGeneration; it gets the tokenizer's words.
        tokenizer: of the words that it shall know; those that it knows come first.
        seed: of the new words.
    """

    blur: Tensor

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        first = model.model.multi_modal_projector.linear_1
        super().__init__(model, tokenizer, torch.zeros_like(first.weight))
        self.model.model.vision_tower.requires_grad_(False)
        with torch.no_grad():
            self.weight.copy_(first.weight)
            self.bias.copy_(first.bias)
        self.fitted.fill_(True)
        said = tokenizer.convert_tokens_to_ids(coordinates())
        _add_words(model, len(tokenizer), said, seed)
        self.register_buffer("blur", _blurred(len(tokenizer), said), persistent=False)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """[B, I, 3, H, W] -> [B, I, N, D] what the tower makes of images."""
        features = tower_features(self.model.model.vision_tower, pixel_values.flatten(0, 1))
        return features.reshape(*pixel_values.shape[:2], *features.shape[1:])

    def loss(
        self, batch: Batch, spotlight: float, drop: float, generator: torch.Generator
    ) -> Tensor:
        """Cross-entropy of the answers, that of coordinates blurred, and a little of their ends.

        Tokens that are read have the positions that they have in the whole image.

        Args:
            batch: of a step.
            spotlight: how likely the model reads a third of the tokens, those on objects first.
            drop: how likely it reads a random part of them.
            generator: of what is random.
        """
        features = self.encode(batch.pixel_values)
        num_prompts, images, num_tokens = features.shape[:3]
        rows = features.flatten(0, 1)
        places = torch.arange(num_tokens).expand(len(rows), -1)
        which = torch.rand(1, generator=generator).item()
        if which < spotlight:
            noise = torch.rand(rows.shape[:2], generator=generator) + batch.shown.flatten(0, 1)
            places = noise.topk(num_tokens // 3, dim=1).indices.sort(dim=1).values
        elif which < spotlight + drop:
            places = random_subset(self.standardise(rows), generator)
        rows = rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2]))
        first = num_tokens * torch.arange(images).repeat(num_prompts)[:, None]
        visual = self.project(rows).reshape(num_prompts, -1, self.weight.shape[0])
        own = (places + first).reshape(num_prompts, -1), images * num_tokens
        read = batch.read
        hidden = read_packed(self.model, self.before, visual, read.words, own)
        learnt = read.targets != IGNORE
        targets, boxes = read.targets[learnt], read.boxes[learnt]
        logs = F.log_softmax(self.model.lm_head(hidden[learnt]), dim=-1)
        right = torch.where(
            boxes, -(self.blur[targets] * logs).sum(1), -logs.gather(1, targets[:, None])[:, 0]
        )
        weight = torch.where(targets == self._end, _END_WEIGHT, 1.0)
        return (weight * right).sum() / weight.sum()


class TowerTeacher(nn.Module):
    """The vision tower while it learns where things are, and stays what it was else.

    Its tokens are to tell, linearly, where their patch is and where the edges of the object on it
    are, and to be near those of the tower before.

    Args:
        tower: that learns. side: patches along an edge.
    """

    places: Tensor

    def __init__(self, tower: Any, side: int) -> None:
        super().__init__()
        self.tower, self._before = tower, [copy.deepcopy(tower).eval()]
        for part in (tower, *self._before):
            part.requires_grad_(part is tower)
        self.where = nn.Linear(tower.config.hidden_size, 6)
        middle = (torch.arange(side) + 0.5) / side
        rows, columns = middle.repeat_interleave(side), middle.repeat(side)
        self.register_buffer("places", torch.stack([columns, rows], 1), persistent=False)

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """Write where each patch is into its position embedding, in two directions of its own.

        The demo VLM's tower has learnt without need of places, and forgets them on the way.
        """
        weight = next(m for m in self.tower.modules() if isinstance(m, nn.Embedding)).weight
        noise = torch.randn(weight.shape[1], 2, generator=generator)
        weight[1:] += _PLACE * (2 * self.places - 1) @ torch.linalg.qr(noise)[0].T

    def loss(self, batch: TowerBatch) -> Tensor:
        """Distance of places and edges, and of the features to those before."""
        with torch.no_grad():
            old = tower_features(self._before[0], batch.pixel_values)
        new = tower_features(self.tower, batch.pixel_values)
        spread = old.std((0, 1)) + 1e-2
        said = self.where(new / spread)
        own = (said[..., :2] - self.places).abs().mean()
        edges = (said[..., 2:] - batch.boxes)[batch.shown].abs().mean()
        loss: Tensor = own + edges + _NEAR * ((new - old) / spread).square().mean()
        return loss


def tower_features(tower: Any, pixel_values: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, N, D]."""
    out = tower(pixel_values, output_hidden_states=True)
    features: Tensor = out.hidden_states[FEATURE_LAYER][:, 1:]
    return features


def _add_words(model: Any, num_words: int, said: list[int], seed: int) -> None:
    """New rows of the embedding: random, those of coordinates along slow waves."""
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(num_words, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    dim = old.shape[1]
    noise = _NEW_STD * torch.randn(num_words, dim, generator=generator)
    along = torch.linspace(0, math.pi, len(said))[:, None] * torch.arange(1, _WAVES + 1)
    waves = torch.cat([along.cos(), along.sin()], 1) / _WAVES**0.5
    noise[said] = _NEW_STD * waves @ torch.randn(2 * _WAVES, dim, generator=generator)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_(noise)
        weight[: len(old)] = old


def _blurred(num_words: int, said: list[int]) -> Tensor:
    """[V, V] what counts as right where a coordinate is: its neighbours a little."""
    number = torch.arange(len(said), dtype=torch.float)
    near = F.softmax(-0.5 * ((number[:, None] - number) / _BLUR) ** 2, dim=1)
    blur = torch.zeros(num_words, num_words)
    rows = torch.tensor(said)
    blur[rows[:, None], rows] = near
    return blur


def trained(reader: nn.Module) -> list[nn.Parameter]:
    """What is trained: all but the tower."""
    return [parameter for parameter in reader.parameters() if parameter.requires_grad]
