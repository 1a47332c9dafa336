"""The demo VLM while it learns boxes: first its tower, then projector and language model.

B images of N tokens, K of which are read; Q conversations about each, of L words.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.demo_grounding.batches import Batch, TowerBatch
from tools.demo_grounding.conversations import Read, coordinates
from tools.demo_vlm.batches import IGNORE
from tools.demo_vlm.learner import align_loss, names_of_patches
from tools.demo_vlm.model import FEATURE_LAYER
from tools.demo_vlm.packing import pack, random_subset
from tools.demo_vlm.reader import Reader

_END_WEIGHT = 0.1
PLACE = 1.5  # size of each wave of the places in the position embedding
PLACE_WAVES = 3
_NEAR = 0.05  # weight of what the tower was
LOOK = 1  # the layer in which names are to look at their objects,
LOOKING = 2  # so many of its heads
WEIGHTS = {
    "words": 1.0,
    "look": 1.0,
    "bind": 0.25,
    "copy": 0.25,
    "near": 1.0,
    "align": 0.4,
    "edges": 0.4,
}
"""Of the terms of the loss."""
BLUR = 0.6  # standard deviation of what counts as right of a coordinate, in steps of coordinates
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
        old = model.model.vision_tower, model.model.multi_modal_projector
        self._old = [copy.deepcopy(part).eval().requires_grad_(False) for part in old]
        self.model.model.vision_tower.requires_grad_(False)
        with torch.no_grad():
            self.weight.copy_(first.weight)
            self.bias.copy_(first.bias)
        self.fitted.fill_(True)
        model.model.language_model.set_attn_implementation("eager")  # others return no attention
        self._said = tokenizer.convert_tokens_to_ids(coordinates())
        self._names = names_of_patches(tokenizer)
        _add_words(model, len(tokenizer), self._said, seed)
        self.register_buffer("blur", _blurred(len(tokenizer), self._said), persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.edges = nn.Linear(len(first.weight), 4 * len(first.weight), bias=False)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D] what the tower makes of images."""
        return tower_features(self.model.model.vision_tower, pixel_values)

    def sight(self, batch: TowerBatch) -> dict[str, Tensor]:
        """What the projector learns first: what the language model saw before, and `edges`."""
        tower, projector = self._old
        with torch.no_grad():
            old = projector(tower_features(tower, batch.pixel_values))
        visual = self.project(self.encode(batch.pixel_values))
        edges = (batch.boxes[batch.shown] * (len(self._said) - 1)).round().long()
        return {
            "near": (visual - old).square().mean() / old.var(),
            "edges": self._edges(visual[batch.shown], edges),
        }

    def loss(
        self, batch: Batch, spotlight: float, drop: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """What is learnt of a step.

        Tokens that are read have the positions that they have in the whole image.

        Args:
            batch: of a step.
            spotlight: how likely the model reads a third of the tokens, those on objects first.
            drop: how likely it reads a random part of them.
            generator: of what is random.

        Returns:
            `words`: the cross-entropy of the answers, that of coordinates blurred, and a little of
            their ends. `align`: the demo VLM's. `edges`: the same for the words of an object's
            edges, each by a linear map of the projection that is dropped later. Of attention, minus
            logarithms of what would be slow to be found alone: `bind`, of names on the colour
            before the shape; `look`, one layer on, of names on their objects' tokens; `copy`, one
            layer on, of where coordinates are said on the names.
        """
        features = self.encode(batch.pixel_values)
        num_tokens = features.shape[1]
        places = torch.arange(num_tokens).expand(len(features), -1)
        which = torch.rand(1, generator=generator).item()
        if which < spotlight:
            noise = torch.rand(features.shape[:2], generator=generator)
            shown = noise + (batch.owner != IGNORE)
            places = shown.topk(num_tokens // 3, dim=1).indices.sort(dim=1).values
        elif which < spotlight + drop:
            places = random_subset(self.standardise(features), generator)
        kept = features.gather(1, places[..., None].expand(-1, -1, features.shape[2]))
        visual = self.project(kept)
        inputs, shared = pack(
            self.model, self.before, visual, batch.read.words, (places, num_tokens)
        )
        unseen = ~inputs.pop("attention_mask")
        hidden = inputs["inputs_embeds"]
        mask = hidden.new_zeros(unseen.shape).masked_fill(unseen, torch.finfo(hidden.dtype).min)
        out = self.model.model.language_model(**inputs, attention_mask=mask, output_attentions=True)
        looks = out.attentions[LOOK][:, :LOOKING, shared:, len(self.before) : shared]
        names, about = batch.read.names.flatten(1), batch.read.about.flatten(1)
        owner = batch.owner.gather(1, places)
        terms = {
            "words": self._words(out.last_hidden_state[:, shared:], batch.read),
            "look": _look(looks, owner, names),
            "bind": _bind(out.attentions[LOOK - 1][:, -1, shared:, shared:], names),
            "copy": _copy(out.attentions[LOOK + 1][:, :, shared:, shared:], names, about),
        }
        shown = owner != IGNORE
        if shown.any():  # else nothing of an object is read
            embeddings = self.model.get_input_embeddings().weight
            edges = batch.edges.gather(1, places[..., None].expand(-1, -1, 4))[shown]
            terms["align"] = align_loss(visual, batch.labels.at(places), embeddings, self._names)
            terms["edges"] = self._edges(visual[shown], edges)
        return terms

    def _edges(self, visual: Tensor, edges: Tensor) -> Tensor:
        said = torch.tensor(self._said)
        near = self.edges(visual).unflatten(1, (4, -1))
        near = F.rms_norm(near, near.shape[2:])
        logits = near @ self.model.get_input_embeddings().weight[said].T
        return F.cross_entropy(logits.flatten(0, 1), self.blur[said][:, said][edges.flatten()])

    def _words(self, hidden: Tensor, read: Read) -> Tensor:
        targets, about = read.targets.flatten(1), read.about.flatten(1)
        learnt = targets != IGNORE
        targets, about = targets[learnt], about[learnt]
        logs = F.log_softmax(self.model.lm_head(hidden[learnt]), dim=-1)
        right = torch.where(
            about != IGNORE,
            -(self.blur[targets] * logs).sum(1),
            -logs.gather(1, targets[:, None])[:, 0],
        )
        weight = torch.where(targets == self._end, _END_WEIGHT, 1.0)
        return (weight * right).sum() / weight.sum()


def _look(looks: Tensor, owner: Tensor, names: Tensor) -> Tensor:
    """Minus the mean logarithm of the attention of names on their objects, if any of it is read.

    Args:
        looks: [B, heads, Q L, K] attention. owner: [B, K], see `Batch`. names: [B, Q L].
    """
    row, word = (names != IGNORE).nonzero(as_tuple=True)
    own = owner[row] == names[row, word][:, None]
    seen = own.any(1)
    mass = (looks[row, :, word] * own[:, None]).sum(2)[seen]
    return -(mass + 1e-6).log().sum() / max(mass.numel(), 1)


def _bind(looks: Tensor, names: Tensor) -> Tensor:
    """Minus the mean logarithm of the attention of names on the word before, which is a colour.

    Args:
        looks: [B, Q L, Q L] attention. names: [B, Q L], see `Read`.
    """
    row, word = (names != IGNORE).nonzero(as_tuple=True)
    return -(looks[row, word, word - 1] + 1e-6).log().sum() / max(len(row), 1)


def _copy(looks: Tensor, names: Tensor, about: Tensor) -> Tensor:
    """Minus the mean logarithm of the attention of coordinates on the name before them.

    Args:
        looks: [B, heads, Q L, Q L] attention. names, about: [B, Q L], see `Read`.
    """
    places = torch.arange(names.shape[1]).expand(len(names), -1)
    last = torch.where(names != IGNORE, places, 0).cummax(1).values
    row, word = (about != IGNORE).nonzero(as_tuple=True)
    mass = looks[row, :, word].gather(
        2, last[row, word][:, None, None].expand(-1, looks.shape[1], 1)
    )
    return -(mass.mean(1) + 1e-6).log().sum() / max(len(row), 1)


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
        """Write where each patch is into its position embedding, as waves in directions of its own.

        The demo VLM's tower has learnt without need of places, and forgets them on the way. Waves
        of the same place are alike, so that neighbours can find each other.
        """
        weight = next(m for m in self.tower.modules() if isinstance(m, nn.Embedding)).weight
        angles = math.pi * self.places[..., None] * torch.arange(1, PLACE_WAVES + 1)
        waves = torch.cat([angles.cos(), angles.sin()], 2).flatten(1)
        noise = torch.randn(weight.shape[1], waves.shape[1], generator=generator)
        weight[1:] += PLACE * waves @ torch.linalg.qr(noise)[0].T

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
    near = F.softmax(-0.5 * ((number[:, None] - number) / BLUR) ** 2, dim=1)
    blur = torch.zeros(num_words, num_words)
    rows = torch.tensor(said)
    blur[rows[:, None], rows] = near
    return blur


def weighed(terms: dict[str, Tensor]) -> Tensor:
    """The sum of the terms of a loss by `WEIGHTS`."""
    return torch.stack([WEIGHTS[name] * term for name, term in terms.items()]).sum()


def trained(reader: nn.Module) -> list[nn.Parameter]:
    """What is trained: all but the tower."""
    return [parameter for parameter in reader.parameters() if parameter.requires_grad]
