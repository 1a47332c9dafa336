"""Dropping tokens inside the language model, by hand: nothing is dropped, columns are masked.

The bare model reads the whole prompt (and the answer so far) in every step, without a cache; in
front of a stage's layer the test chooses, and from there on nobody looks at the other columns.

B rows, L columns, H heads, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Inputs = dict[str, Any]
_PER_ROW = ("input_ids", "attention_mask")


@dataclass
class View:
    """What a test may look at in front of a layer.

    Args:
        weights: [B, H, L, L] attention of the layer before.
        coming: the same of the coming layer, if all that is still there were read.
        hidden: [B, L, D'] what it reads.
        images: for every row, the columns of each image that are still there.
        text: for every row, the columns of the text after the last image, the answer left out.
        layer: its number.
    """

    weights: Tensor
    coming: Callable[[], Tensor]
    hidden: Tensor
    images: list[list[list[int]]]
    text: list[list[int]]
    layer: int


Choose = Callable[[View], list[list[list[int]]]]
"""For every row, the columns of each image that stay."""


@dataclass
class Masked:
    """A model whose layers do not see what was dropped before them.

    Args:
        model: a bare host.
        stages: layer -> what chooses in front of it.
        renumber: whether what stays is numbered anew.
    """

    model: Any
    stages: dict[int, Choose]
    renumber: bool = False
    kept: dict[int, list[list[list[int]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = deepcopy(self.model)
        self.model.model.language_model.set_attn_implementation("eager")

    @torch.no_grad()
    def logits(self, inputs: Inputs, answer: Tensor | None = None) -> Tensor:
        """[B, L + n, V] of the prompt and the n tokens of an answer."""
        length = inputs["input_ids"].shape[1]
        if answer is not None:
            inputs = _extend(inputs, answer)
        with self._masking(inputs, length):
            return self.model(**inputs, use_cache=False).logits

    def greedy(self, inputs: Inputs, num_new: int, said: Tensor | None = None) -> Tensor:
        """[B, n], token by token, after what was `said` [B, m]; padding is on the left."""
        answer = inputs["input_ids"][:, :0] if said is None else said
        for _ in range(num_new):
            last = self.logits(inputs, answer)[:, -1]
            answer = torch.cat([answer, last.argmax(dim=-1, keepdim=True)], dim=1)
        return answer[:, answer.shape[1] - num_new :]

    @torch.no_grad()
    def generate(self, inputs: Inputs, settings: dict[str, Any]) -> Tensor:
        """What the host's own generate() says, which must run without a cache."""
        torch.manual_seed(0)
        length = inputs["input_ids"].shape[1]
        beams = settings.get("num_beams", 1)
        times = beams if beams > 1 else settings.get("num_return_sequences", 1)
        repeated = {name: inputs[name].repeat_interleave(times, dim=0) for name in _PER_ROW}
        with self._masking(repeated, length):
            return self.model.generate(**inputs, **settings)

    @contextmanager
    def _masking(self, inputs: Inputs, length: int) -> Iterator[None]:
        state = _State(self, inputs, length)
        language_model = self.model.model.language_model
        handles = [language_model.register_forward_pre_hook(state.begin, with_kwargs=True)]
        for number, layer in enumerate(language_model.layers):
            handles.append(layer.register_forward_pre_hook(state.before(number), with_kwargs=True))
            handles.append(layer.self_attn.register_forward_hook(state.after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _State:
    def __init__(self, masked: Masked, inputs: Inputs, length: int) -> None:
        self.masked, self.length, self.inputs = masked, length, inputs

    def begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A pass through the language model: nothing is dropped yet."""
        config, inputs = self.masked.model.config, self.inputs
        size = kwargs["inputs_embeds"].shape[1]
        self.real = pad(
            inputs["attention_mask"], (0, size - inputs["attention_mask"].shape[1]), value=1
        ).bool()
        ids = pad(inputs["input_ids"], (0, size - inputs["input_ids"].shape[1]), value=1)
        is_image = (ids == config.image_token_id) & self.real
        self.images = [_runs(row) for row in is_image]
        self.text = []
        for row, images, real in zip(is_image, self.images, self.real, strict=True):
            last = images[-1][-1] if images else -1
            columns = range(self.length)
            self.text.append([c for c in columns if real[c] and not row[c] and c > last])
        self.visible = self.real.clone()
        self.weights = torch.empty(0)
        self.rope: Any = None

    def after(self, module: Any, args: Any, output: Any) -> None:
        self.weights = output[1]

    def before(self, number: int) -> Callable[..., Any]:
        def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs = kwargs | self._hidden_columns(kwargs["attention_mask"])
            if self.rope is not None:
                kwargs["position_embeddings"] = self.rope
            if number in self.masked.stages:
                self._choose(number, layer, hidden, kwargs)
                kwargs |= self._hidden_columns(kwargs["attention_mask"])
                if self.rope is not None:
                    kwargs["position_embeddings"] = self.rope
            return args, kwargs

        return hook

    def _hidden_columns(self, mask: Tensor) -> dict[str, Tensor]:
        low = torch.finfo(mask.dtype).min
        blind = ~self.visible[:, None, None] & ~torch.eye(mask.shape[-1], dtype=torch.bool)
        return {"attention_mask": mask.masked_fill(blind, low)}

    def _choose(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        def coming() -> Tensor:
            normed = layer.input_layernorm(hidden)
            names = ("attention_mask", "position_embeddings")
            weights = layer.self_attn(normed, **{name: kwargs[name] for name in names})[1]
            return weights

        view = View(self.weights, coming, hidden, self.images, self.text, number)
        kept = self.masked.stages[number](view)
        self.masked.kept[number] = kept
        for row, (before, after) in enumerate(zip(self.images, kept, strict=True)):
            gone = {c for image in before for c in image} - {c for image in after for c in image}
            self.visible[row, sorted(gone)] = False
        self.images = kept
        if self.masked.renumber:
            numbers = (self.visible.long().cumsum(dim=1) - 1).clamp(min=0)
            self.rope = self.masked.model.model.language_model.rotary_emb(hidden, numbers)


def _runs(is_image: Tensor) -> list[list[int]]:
    """Columns of each run of placeholders."""
    runs: list[list[int]] = []
    for column in is_image.nonzero()[:, 0].tolist():
        if runs and runs[-1][-1] == column - 1:
            runs[-1].append(column)
        else:
            runs.append([column])
    return runs


def _extend(inputs: Inputs, answer: Tensor) -> Inputs:
    more = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    more["mm_token_type_ids"] = torch.zeros_like(answer)
    names = [name for name in more if name in inputs]
    return inputs | {name: torch.cat([inputs[name], more[name]], dim=1) for name in names}


def last_row(num_keep: Callable[[int], int]) -> Choose:
    """FastV's rule: the tokens to which the prompt's last one attends most."""

    def choose(view: View) -> list[list[list[int]]]:
        kept = []
        for row, images in enumerate(view.images):
            scores = view.weights[row].mean(dim=0)[view.text[row][-1]] if images else None
            kept.append([best(scores, image, num_keep(len(image))) for image in images])
        return kept

    return choose


def best(scores: Tensor | None, columns: list[int], count: int) -> list[int]:
    assert scores is not None
    return sorted(sorted(columns, key=lambda c: -float(scores[c]))[:count])
