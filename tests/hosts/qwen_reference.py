"""What the tests of Qwen's models compare with: tokens and prompts made by hand, without our code.

I images, N units of an image, P patches of it, B rows, L and L' columns of the prompt and of the
short one, D' width of the language model, E of its layers that add rows of the tower, R' image
tokens of the short prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tiny_models import IMAGE_TOKEN
from torch import Tensor

Kept = list[list[int]]


@dataclass
class Looked:
    """One image in the tower, run eagerly in raster order of units: patches by patches."""

    hidden: list[Tensor]  # [P, D] each
    attention: list[Tensor]  # [P, P] each, mean over heads, 0 outside the segment
    keys: list[Tensor]  # [P, D] each, before rotation
    projected: Tensor  # [N, D']
    deepstack: list[Tensor] = field(default_factory=list)  # E of [N, D']

    def received(self, block: int) -> Tensor:
        """[N]."""
        weights = self.attention[block]
        size = (weights > 0).sum(dim=0)  # queries of each patch's segment
        return by_unit(weights.sum(dim=0) / size)

    def given(self, block: int) -> Tensor:
        """[N]."""
        weights = self.attention[block]
        return by_unit(weights.sum(dim=1) / (weights > 0).sum(dim=1))


def by_unit(patches: Tensor) -> Tensor:
    """[P, ...] -> [N, ...]."""
    return torch.stack([unit.mean(dim=0) for unit in patches.split(4)])


@torch.no_grad()
def look(model: Any, patches: Tensor, grid: list[int]) -> Looked:
    """Run the tower's parts on one image, windows by a mask instead of an order."""
    tower = model.model.visual
    config, heads = tower.config, tower.config.num_heads
    window = getattr(config, "window_size", 10**6) // config.patch_size  # patches
    whole_images = getattr(config, "fullatt_block_indexes", range(config.depth))
    places = patches_in_units(grid)
    windows = [(row // window, column // window) for row, column in places]
    same = torch.tensor([[a == b for b in windows] for a in windows])
    states = tower.patch_embed(patches) + learned_places(tower, grid)
    size = states.shape[1] // heads
    frequencies = 10000.0 ** -(torch.arange(0, size // 2, 2) / (size // 2))
    angles = (torch.tensor(places)[:, :, None] * frequencies).flatten(1).repeat(1, 2)[:, None]
    found = Looked([states], [], [], states)
    for number, block in enumerate(tower.blocks):
        q, k, v = block.attn.qkv(block.norm1(states)).view(len(states), 3, heads, size).unbind(1)
        found.keys.append(k.flatten(1))
        q, k = rotated(q, angles), rotated(k, angles)
        logits = torch.einsum("qhd,khd->hqk", q, k) * size**-0.5
        if number not in whole_images:
            logits = logits.masked_fill(~same, float("-inf"))
        weights = logits.softmax(dim=-1)
        found.attention.append(weights.mean(dim=0))
        states = states + block.attn.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        states = states + block.mlp(block.norm2(states))
        found.hidden.append(states)
        if number in (added := list(getattr(config, "deepstack_visual_indexes", []))):
            found.deepstack.append(tower.deepstack_merger_list[added.index(number)](states))
    found.projected = tower.merger(states)
    return found


def patches_in_units(grid: list[int]) -> list[tuple[int, int]]:
    """Row and column of every patch, unit after unit."""
    _, height, width = grid
    units = [(row, column) for row in range(0, height, 2) for column in range(0, width, 2)]
    within = [(down, right) for down in range(2) for right in range(2)]
    return [(row + down, column + right) for row, column in units for down, right in within]


def learned_places(tower: Any, grid: list[int]) -> Tensor | float:
    """[P, D] the embeddings of places that a tower learned for another size; 0 if it did not."""
    if not hasattr(tower, "pos_embed"):
        return 0.0
    learned = tower.pos_embed.weight
    side = int(len(learned) ** 0.5)
    square = learned.unflatten(0, (side, side)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        square, size=tuple(grid[1:]), mode="bilinear", align_corners=True
    )[0]
    return torch.stack([resized[:, row, column] for row, column in patches_in_units(grid)])


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def look_at_all(model: Any, inputs: Any) -> list[Looked]:
    """Every image of a call, on its own."""
    grids = inputs["image_grid_thw"]
    images = inputs["pixel_values"].split(grids.prod(dim=1).tolist())
    return [look(model, *image) for image in zip(images, grids.tolist(), strict=True)]


@dataclass
class Short:
    """A prompt pruned by hand: [B, L', D'], [B, L'], [3, B, L'], and the next coordinates [B]."""

    embeddings: Tensor
    mask: Tensor
    coordinates: Tensor
    following: Tensor
    ids: Tensor
    model: Any
    deepstack: list[Tensor]  # E of [R', D']

    def positions(self, num_more: int = 0) -> Tensor:
        """[4, B, L' + n]."""
        columns = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        more = torch.arange(num_more)
        columns = torch.cat([columns, self.mask.sum(dim=1, keepdim=True) + more], dim=1)
        later = (self.following[:, None] + more).expand(3, -1, -1)
        return torch.cat([columns[None], torch.cat([self.coordinates, later], dim=2)])

    def logits(self, answer: Tensor | None = None) -> Tensor:
        """[B, L' + n, V] of the prompt and the n tokens of an answer."""
        embeddings, mask, num_more = self.embeddings, self.mask, 0
        if answer is not None:
            num_more = answer.shape[1]
            embed = self.model.model.language_model.embed_tokens
            embeddings = torch.cat([embeddings, embed(answer)], dim=1)
            mask = torch.cat([mask, torch.ones_like(answer)], dim=1)
        more = {}
        if self.deepstack:
            images = torch.nn.functional.pad(self.images, (0, num_more))
            more = {"visual_pos_masks": images, "deepstack_visual_embeds": self.deepstack}
        states = self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=self.positions(num_more),
            use_cache=False,
            **more,
        ).last_hidden_state
        return self.model.lm_head(states)

    @property
    def images(self) -> Tensor:
        """[B, L'] bool, where image tokens are."""
        return (self.ids == self.model.config.image_token_id) & self.mask.bool()

    @torch.no_grad()
    def greedy(self, num_new: int, after: Tensor | None = None) -> Tensor:
        """[B, n] the answer, token by token, to the prompt and what came `after` it [B, m]."""
        text = self.ids[:, :0] if after is None else after
        for _ in range(num_new):
            last = self.logits(text)[:, -1]
            last[:, self.model.config.image_token_id] = float("-inf")
            text = torch.cat([text, last.argmax(dim=-1, keepdim=True)], dim=1)
        return text[:, text.shape[1] - num_new :]

    def generate(self, **settings: Any) -> Any:
        """What the host's own generate() makes of it; call it while no pruner is attached."""
        assert "generate" not in self.model.__dict__
        with torch.no_grad(), self.adding_layers():
            return self.model.generate(
                inputs_embeds=self.embeddings,
                attention_mask=self.mask,
                position_ids=self.positions(),
                **settings,
            )

    @contextmanager
    def adding_layers(self) -> Iterator[None]:
        """Add rows of the tower to the states behind decoder layers as they read the prompt."""

        def add(rows: Tensor, states: Tensor) -> Tensor | None:
            if states.shape[1] == 1:  # a step behind the prompt
                return None
            whole = torch.zeros_like(self.embeddings)
            whole[self.images] = rows
            return states + whole.repeat_interleave(len(states) // len(whole), dim=0)

        hooks = []
        layers = self.model.model.language_model.layers
        for layer, rows in zip(layers, self.deepstack, strict=False):
            hook = layer.register_forward_hook(lambda *call, rows=rows: add(rows, call[2]))
            hooks.append(hook)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def coordinates_of(
    ids: list[int], grids: list[list[int]], image_token: int = IMAGE_TOKEN
) -> tuple[list[tuple[int, ...]], int]:
    """Of every token of a prompt (time, row, column), and the next one; `grids` are used up."""
    found: list[tuple[int, ...]] = []
    now, column = 0, 0
    while column < len(ids):
        if ids[column] != image_token:
            found.append((now, now, now))
            now, column = now + 1, column + 1
            continue
        _, height, width = grids.pop(0)
        for row in range(height // 2):
            found += [(now, now + row, now + place) for place in range(width // 2)]
        column += height * width // 4
        now += max(height, width) // 2
    return found, now


@torch.no_grad()
def shorten(
    model: Any,
    inputs: Any,
    kept: Kept,
    side: Literal["left", "right"] = "left",
    looked: list[Looked] | None = None,
) -> Short:
    """Drop all image tokens but `kept` (of each image) from the prompt, by hand."""
    if looked is None:
        looked = look_at_all(model, inputs)
    grids = inputs["image_grid_thw"].tolist()
    images = iter(zip([image.projected for image in looked], kept, strict=True))
    by_layer = zip(*(image.deepstack for image in looked), strict=True)
    deepstack = [
        torch.cat([rows[keep] for rows, keep in zip(layer, kept, strict=True)])
        for layer in by_layer
    ]
    embed, image_token = model.get_input_embeddings(), model.config.image_token_id
    rows, places, words, following = [], [], [], []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()].tolist()
        coordinates, next_one = coordinates_of(ids, grids, image_token)
        vectors, own, names, column = [], [], [], 0
        while column < len(ids):
            if ids[column] == image_token:
                tokens, keep = next(images)
                vectors.append(tokens[keep])
                own += [coordinates[column + i] for i in keep]
                names += [image_token] * len(keep)
                column += len(tokens)
            else:
                vectors.append(embed(torch.tensor(ids[column : column + 1])))
                own.append(coordinates[column])
                names.append(ids[column])
                column += 1
        rows.append(torch.cat(vectors))
        places.append(torch.tensor(own))
        words.append(torch.tensor(names))
        following.append(next_one)
    length = max(map(len, rows))

    def padded(parts: list[Tensor]) -> Tensor:
        whole = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
        for row, part in zip(whole, parts, strict=True):
            row[slice(length - len(part), None) if side == "left" else slice(len(part))] = part
        return whole

    ones = padded([torch.ones(len(row)).long() for row in rows])
    coordinates = padded(places).permute(2, 0, 1)
    after = torch.tensor(following)
    return Short(padded(rows), ones, coordinates, after, padded(words), model, deepstack)
