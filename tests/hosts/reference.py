"""What the host tests compare with: prompts pruned by hand, without any of our code.

B rows, I images of a batch, N = 16 tokens of an image, L and L' columns of the prompt and of the
short one, D' width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tiny_models import BOS, IMAGE_TOKEN, PAD
from torch import Tensor

from ocvtp import Needs, Pruner, Selection, VisualTokens

Inputs = dict[str, Any]
Side = Literal["left", "right"]
NUM_TOKENS = 16
IMG = "image"
ONE = [(5, IMG, 4)]
SEVERAL = [(5, IMG, 3, IMG, IMG, 4)]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
BATCH = [(5, IMG, 4), (9,), (3, IMG, 2, IMG, 6)]
"""Rows of a prompt: numbers stand for so many text tokens."""


@dataclass(kw_only=True, eq=False)
class Scripted(Pruner):
    """Keeps what the test says and remembers what it was shown."""

    num_keep: int | None = NUM_TOKENS
    choose: Callable[[VisualTokens], Selection] = field(default=lambda tokens: keep_first(tokens))
    wants: Needs = field(default_factory=Needs)
    seen: list[VisualTokens] = field(default_factory=list)

    name = "scripted"
    status = "control"

    @property
    def needs(self) -> Needs:
        return self.wants

    def _select(self, tokens: VisualTokens, num_keep: int) -> Selection:
        self.seen.append(tokens)
        return self.choose(tokens)


def keep_first(tokens: VisualTokens, num_keep: int = 3) -> Selection:
    return Selection(torch.arange(num_keep).repeat(tokens.batch_size, 1))


def make_batch(
    rows: Sequence[tuple[int | str, ...]], side: Side = "left", seed: int = 0, registers: int = 0
) -> Inputs:
    """What a processor returns; each image has placeholders for its tokens and the registers."""
    random = torch.Generator().manual_seed(seed)
    prompts, num_images = [], 0
    for row in rows:
        ids = [BOS]
        for part in row:
            if part == IMG:
                ids += [IMAGE_TOKEN] * (registers + NUM_TOKENS)
                num_images += 1
            else:
                ids += torch.randint(3, 99, (int(part),), generator=random).tolist()
        prompts.append(ids)
    length = max(map(len, prompts))
    ids = torch.stack([_pad(torch.tensor(p), length, side, PAD) for p in prompts])
    mask = torch.stack([_pad(torch.ones(len(p)).long(), length, side, 0) for p in prompts])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if num_images:
        inputs["pixel_values"] = torch.randn(num_images, 3, 56, 56, generator=random)
    return inputs


def make_prompts(
    processor: Any, rows: Sequence[str], side: Side = "left", registers: int = 0
) -> Inputs:
    """What a processor returns for these prompts and random images."""
    processor.tokenizer.padding_side = side
    text = [row.replace("<image>", "<image>" * (registers + NUM_TOKENS)) for row in rows]
    inputs = dict(processor.tokenizer(text, padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    num_images = sum(row.count("<image>") for row in rows)
    random = torch.Generator().manual_seed(num_images)
    return inputs | {"pixel_values": torch.randn(num_images, 3, 56, 56, generator=random)}


def single(inputs: Inputs, row: int) -> Inputs:
    """One row of a batch, without its padding."""
    real = inputs["attention_mask"][row].bool()
    per_row = (inputs["input_ids"] == IMAGE_TOKEN).sum(dim=1)
    per_row = per_row * len(inputs["pixel_values"]) // per_row.sum()
    first = int(per_row[:row].sum())
    alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    if per_row[row]:
        alone["pixel_values"] = inputs["pixel_values"][first : first + int(per_row[row])]
    return alone


def tower_states(model: Any, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """All hidden states [I, T, D] and attentions [I, H, T, T] of the tower, run eagerly."""
    tower = deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        output = tower(pixel_values, output_hidden_states=True, output_attentions=True)
    return output.hidden_states, output.attentions


def project(model: Any, pixel_values: Tensor) -> Tensor:
    """[I, N, D'] what the language model reads of each image, the registers first."""
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    has_cls = model.config.vision_feature_select_strategy == "default"
    features = states[model.config.vision_feature_layer][:, int(has_cls) :]
    return model.model.multi_modal_projector(features)


def num_registers(model: Any) -> int:
    """Rows that the language model reads of each image besides its tokens."""
    return int(getattr(model.config.vision_config, "num_register_tokens", 0))


def first_patch(model: Any) -> int:
    """The number of the first patch among the tokens of the tower."""
    has_cls = model.config.vision_feature_select_strategy == "default"
    return int(has_cls) + num_registers(model)


def best_by_cls(model: Any, pixel_values: Tensor, num_keep: int) -> list[list[int]]:
    """For each image, the tokens that the CLS of block -2 attends to most, ascending."""
    _, attentions = tower_states(model, pixel_values)
    scores = attentions[-2].mean(dim=1)[:, 0, first_patch(model) :]
    return [sorted(image.topk(num_keep).indices.tolist()) for image in scores]


@dataclass
class Short:
    """A prompt pruned by hand: [B, L', D'], [B, L'], [B, L'] (old columns, -1 on padding)."""

    embeddings: Tensor
    mask: Tensor
    columns: Tensor
    model: Any

    def gather(self, values: Tensor, fill: int = 0) -> Tensor:
        """[B, L] -> [B, L']."""
        return values.gather(1, self.columns.clamp(min=0)).masked_fill(self.columns < 0, fill)

    def positions(self, kind: str) -> Tensor:
        """Numbers of the columns: without the dropped tokens, or as they were."""
        if kind == "contiguous":
            return (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        first = self.columns.masked_fill(self.columns < 0, 10**6).amin(dim=1, keepdim=True)
        return (self.columns - first).clamp(min=0)

    def logits(self, positions: Tensor | None = None, answer: Tensor | None = None) -> Tensor:
        """[B, L' + n, V] of the prompt and the n tokens of an answer."""
        embeddings, mask = self.embeddings, self.mask
        if answer is not None and answer.shape[1]:
            embed = self.model.model.language_model.embed_tokens
            embeddings = torch.cat([embeddings, embed(answer)], dim=1)
            mask = torch.cat([mask, torch.ones_like(answer)], dim=1)
            if positions is not None:
                steps = torch.arange(1, answer.shape[1] + 1)
                positions = torch.cat([positions, positions[:, -1:] + steps], dim=1)
        states = self.model.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return self.model.lm_head(states)

    @torch.no_grad()
    def greedy(
        self, num_new: int, positions: str = "contiguous", after: Tensor | None = None
    ) -> Tensor:
        """[B, n] the answer, token by token, to the prompt and what came `after` it [B, m]."""
        text = self.columns.new_empty(len(self.columns), 0) if after is None else after
        for _ in range(num_new):
            last = self.logits(self.positions(positions), text)[:, -1]
            text = torch.cat([text, last.argmax(dim=-1, keepdim=True)], dim=1)
        return text[:, text.shape[1] - num_new :]

    def generate(self, **settings: Any) -> Any:
        """What the host's own generate() makes of it; call it while no pruner is attached."""
        assert "generate" not in self.model.__dict__
        with torch.no_grad():
            return self.model.generate(
                inputs_embeds=self.embeddings, attention_mask=self.mask, **settings
            )


def shorten(
    model: Any,
    inputs: Inputs,
    kept: list[list[int]],
    side: Side = "left",
    projected: Tensor | None = None,
) -> Short:
    """Drop all image tokens but `kept` (of each image) from the prompt, by hand.

    Rows before the last `NUM_TOKENS` of an image are registers, which stay.
    """
    if projected is None:
        projected = project(model, inputs["pixel_values"])
    images = iter(zip(projected, kept, strict=True))
    embed = model.model.language_model.embed_tokens
    rows, columns = [], []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        vectors, numbers = [], []
        column = 0
        while column < len(ids):
            if not mask[column]:
                column += 1
            elif ids[column] == IMAGE_TOKEN:
                tokens, keep = next(images)
                registers = len(tokens) - NUM_TOKENS
                keep = [*range(registers), *(registers + i for i in keep)]
                vectors.append(tokens[keep])
                numbers += [column + i for i in keep]
                column += len(tokens)
            else:
                vectors.append(embed(ids[column])[None])
                numbers.append(column)
                column += 1
        rows.append(torch.cat(vectors))
        columns.append(torch.tensor(numbers))
    length = max(map(len, rows))
    padded = torch.stack([_pad(row, length, side, 0.0) for row in rows])
    kept_columns = torch.stack([_pad(c, length, side, -1) for c in columns])
    return Short(padded, (kept_columns >= 0).long(), kept_columns, model)


def _pad(values: Tensor, length: int, side: Side, fill: float) -> Tensor:
    padding = values.new_full((length - len(values), *values.shape[1:]), fill)
    return torch.cat([padding, values] if side == "left" else [values, padding])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Equal up to rounding, relative to the largest entry."""
    assert actual.shape == expected.shape
    worst = float(((actual - expected).abs().max() / expected.abs().max()).detach())
    assert worst <= tolerance


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything that attaching may touch: attributes, hooks and methods of all modules."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, dict):
                for entry, item in value.items():
                    found[f"{name}.{key}.{entry}"] = id(item)
            else:
                found[f"{name}.{key}."] = id(value)
        for method in ("forward", "generate", "__call__"):
            found[f"{name}.{method}()"] = getattr(getattr(module, method, None), "__func__", None)
    return found


def answer_of(model: Any, inputs: Any, **settings: Any) -> Tensor:
    """The answer; checks that the caller's prompt stands in front of it."""
    sequences = model.generate(**inputs, **settings)
    ids = inputs["input_ids"]
    repeats = len(sequences) // len(ids)
    assert torch.equal(sequences[:, : ids.shape[1]], ids.repeat_interleave(repeats, dim=0))
    return sequences[:, ids.shape[1] :]


def ask(model: Any, inputs: Any, **settings: Any) -> Tensor:
    """The five tokens that the model answers, greedily."""
    output = model.generate(**inputs, **GREEDY, **settings)
    return output[:, inputs["input_ids"].shape[1] :]
