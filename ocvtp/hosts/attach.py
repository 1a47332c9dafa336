"""Put a pruner into a model and take it out again.

Two instance attributes (`forward`, `generate`) and a few inert hooks on the vision tower are all
that a model gets; `remove()` takes them away. What belongs to one call lives in local variables and
in a ContextVar, so that threads do not see each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ocvtp.hosts import generation
from ocvtp.hosts.base import Host
from ocvtp.hosts.llava import LlavaHost
from ocvtp.hosts.rewrite import Positions, Prompt, shorten
from ocvtp.pruners import Pruner

HOSTS: tuple[type[Host], ...] = (LlavaHost,)
_STATE = "_ocvtp_state"
_WRAPPED = ("forward", "generate")

_PROMPT: ContextVar[tuple[Any, Prompt] | None] = ContextVar("ocvtp_prompt", default=None)


@dataclass
class _State:
    """What an attached model carries."""

    host: Host
    pruner: Pruner
    positions: Positions
    on_prune: Callable[[Prompt], None] | None
    before: dict[str, Any] = field(default_factory=dict)  # instance attributes that stood there


class Handle:
    """An attached pruner; `remove()` takes it out, and may be called more than once."""

    def __init__(self, model: Any, hooks: list[RemovableHandle]) -> None:
        self._model = model
        self._hooks = hooks

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        attributes = self._model.__dict__
        state = attributes.pop(_STATE, None)
        if state is None:
            return
        for name in _WRAPPED:
            # If somebody wrapped ours meanwhile, leave theirs: ours passes through without state.
            if isinstance(attributes.get(name), _Wrapper):
                del attributes[name]
                if name in state.before:
                    attributes[name] = state.before[name]


class _Wrapper(partial):  # type: ignore[type-arg]
    """`partial(function, model)` with the signature of the method it stands for.

    generate() inspects forward's parameters; and a partial copies and pickles with its model.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        model = self.args[0]
        return inspect.signature(getattr(type(model), self.func.__name__[1:]).__get__(model))


def find_host(model: Any) -> Host:
    """The adapter of a (possibly wrapped) model.

    Raises:
        ValueError: if its `model_type` is not supported.
    """
    model = unwrap(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for host in HOSTS:
        if kind in host.model_types:
            return host(model)
    supported = ", ".join(sorted(t for host in HOSTS for t in host.model_types))
    raise ValueError(
        f"{type(model).__name__} (model_type={kind!r}) is not supported; pass a transformers"
        f" ...ForConditionalGeneration of model_type {supported}."
    )


def unwrap(model: Any) -> Any:
    """The transformers model inside PEFT, DDP and torch.compile."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "module") and not hasattr(model, "generation_config"):
            model = model.module
        else:
            return model


def attach(
    model: Any,
    pruner: Pruner,
    *,
    positions: Positions = "contiguous",
    on_prune: Callable[[Prompt], None] | None = None,
) -> Handle:
    """Prune the visual tokens of every call of `model(...)` and `model.generate(...)`.

    Args:
        model: a supported transformers VLM, also inside PEFT, DDP or torch.compile.
        pruner: see `ocvtp.build_pruner`.
        positions: `contiguous` numbers the tokens that are left from 0; `original` leaves each
            token the position that it had.
        on_prune: called with every shortened prompt, e.g. to count tokens.

    Returns:
        a handle whose `remove()` leaves the model as it was.

    Raises:
        ValueError: if the model is not supported, has a pruner already, or cannot supply what the
            pruner needs.
    """
    model = unwrap(model)
    if _STATE in model.__dict__:
        raise ValueError(
            "a pruner is attached to this model already; remove it first (handle.remove(), or"
            " leave its `with` block)."
        )
    if positions not in ("contiguous", "original"):
        raise ValueError(f"positions={positions!r}; pass 'contiguous' or 'original'.")
    host = find_host(model)
    if pruner.stage not in host.stages:
        raise ValueError(
            f"pruner {pruner.name!r} acts at stage {pruner.stage!r}; the host of"
            f" {model.config.model_type!r} serves {', '.join(host.stages)}."
        )
    host.check(pruner.needs)
    hooks = host.install(pruner.needs)
    state = _State(host, pruner, positions, on_prune)
    state.before = {name: model.__dict__[name] for name in _WRAPPED if name in model.__dict__}
    model.__dict__[_STATE] = state
    model.__dict__["forward"] = _Wrapper(_forward, model)
    model.__dict__["generate"] = _Wrapper(_generate, model)
    return Handle(model, hooks)


@contextmanager
def attached(model: Any, pruner: Pruner, **options: Any) -> Iterator[Handle]:
    """`attach` inside a `with` block; removed at its end, also after an exception."""
    handle = attach(model, pruner, **options)
    try:
        yield handle
    finally:
        handle.remove()


def _original(model: Any, state: _State | None, name: str) -> Callable[..., Any]:
    if state is not None and name in state.before:
        function: Callable[..., Any] = state.before[name]
        return function
    return partial(getattr(type(model), name), model)


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    state: _State | None = model.__dict__.get(_STATE)
    original = _original(model, state, "forward")
    if state is None:
        return original(*args, **kwargs)
    ids = kwargs.get("input_ids", args[0] if args else None)
    has_images = kwargs.get("pixel_values") is not None or len(args) > 1
    if not has_images and (ids is None or ids.shape[1] == 1):
        return original(*args, **kwargs)  # every decode step: cheap, and traceable by dynamo
    if args:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        kwargs = dict(zip(names, args, strict=False)) | kwargs
    running = _PROMPT.get()
    if running is not None and running[0] is model:  # inside generate: the ids are short already
        return original(**_splice(model, running[1], kwargs))
    if kwargs.get("pixel_values") is None:
        return original(**kwargs)
    if kwargs.get("past_key_values") is not None and generation.cache_length(kwargs):
        raise ValueError(
            "forward() got images and a filled cache while a pruner is attached: the attention"
            " mask would not match the short cache. Use generate(), or pass the images with an"
            " empty cache."
        )
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise ValueError(
            "logits_to_keep is a tensor of token numbers, which pruning changes; pass an int."
        )
    short, prompt = _shorten(state, kwargs)
    short.pop("input_ids")
    return original(**short, inputs_embeds=prompt.embeddings)


def _shorten(state: _State, inputs: dict[str, Any]) -> tuple[dict[str, Any], Prompt]:
    short, prompt = shorten(state.host, state.pruner, inputs, state.positions)
    if state.on_prune is not None:
        state.on_prune(prompt)
    return short, prompt


def _splice(model: Any, prompt: Prompt, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Put the prepared embeddings where this forward sees tokens of the short prompt."""
    ids = kwargs.get("input_ids")
    if ids is None:
        return kwargs
    past = generation.cache_length(kwargs)
    here = slice(past, past + ids.shape[1])
    if past >= prompt.short_length:
        return kwargs
    repeats, rest = divmod(ids.shape[0], prompt.short_ids.shape[0])
    expected = prompt.short_ids[:, here].repeat_interleave(max(repeats, 1), dim=0)
    head = ids[:, : expected.shape[1]]
    if rest or not torch.equal(expected.to(ids.device), head):
        if bool((ids == model.config.image_token_id).any()):
            raise ValueError(
                "generate() ran the model on image placeholders that are not the prompt's (e.g. a"
                " negative prompt with an image); leave them out while a pruner is attached."
            )
        return kwargs  # e.g. the text-only branch of classifier-free guidance
    kwargs = dict(kwargs)
    tail = kwargs.pop("input_ids")[:, expected.shape[1] :]
    embeddings = prompt.embeddings[:, here].repeat_interleave(repeats, dim=0)
    if tail.shape[1]:
        embed = model.get_input_embeddings()
        embeddings = torch.cat([embeddings, embed(tail).to(embeddings)], dim=1)
    kwargs["inputs_embeds"] = embeddings
    if prompt.gapped and kwargs.get("attention_mask") is None:
        # An all-ones mask may have been dropped; without one, gaps look like packed sequences.
        kwargs["attention_mask"] = torch.ones(
            ids.shape[0], past + ids.shape[1], dtype=torch.long, device=ids.device
        )
    return kwargs


@torch.no_grad()
def _generate(model: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
    state: _State | None = model.__dict__.get(_STATE)
    original = _original(model, state, "generate")
    if isinstance(inputs, Tensor) and inputs.ndim == 2 and kwargs.get("input_ids") is None:
        kwargs["input_ids"], inputs = inputs, None
    if state is None:
        return original(inputs, *args, **kwargs)
    remembered = generation.remembered_prompt(kwargs)
    if remembered is not None:  # a later turn: the images are in the cache
        turn, full_ids = generation.later_turn(state.host, remembered, kwargs)
        shown = generation.Shown(full_ids, turn["input_ids"].shape[1])
        prompt = None
    elif kwargs.get("pixel_values") is None:
        return original(inputs, *args, **kwargs)
    else:
        named = set(inspect.signature(type(model).forward).parameters)
        named -= {"logits_to_keep", "use_cache", "past_key_values"}
        ours = {k: kwargs.pop(k) for k in list(kwargs) if k in named}
        turn, prompt = _shorten(state, ours)
        turn |= kwargs
        shown = generation.Shown(prompt.input_ids, prompt.short_length)
    generation.adjust(model, args, turn, shown)
    token = _PROMPT.set(None if prompt is None else (model, prompt))
    try:
        output = original(None, *args, **turn)
    finally:
        _PROMPT.reset(token)
    generation.remember(output, turn, prompt or remembered)
    return generation.restore(output, shown)
