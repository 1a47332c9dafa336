"""What an attached model runs in place of its forward() and generate().

B rows of the batch, L tokens of the caller's prompt, L' of the short one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.base import Host
from ocvtp.hosts.in_llm import hooks
from ocvtp.hosts.in_llm.deepstack import Deepstack, handing
from ocvtp.hosts.prompt.read_call import Encode, encode_anew, look
from ocvtp.hosts.prompt.read_prompt import Reader
from ocvtp.hosts.prompt.select import Select, select
from ocvtp.hosts.prompt.shorten import Positions, Prompt, Shortened, shorten
from ocvtp.hosts.runtime import caller_processors, conversation, forward_output, generate_arguments
from ocvtp.hosts.runtime.forward_output import Logits
from ocvtp.hosts.runtime.installed_hooks import InstalledHooks
from ocvtp.hosts.wrap_methods import Original
from ocvtp.pruners import Pruner
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.structures import Needs
from ocvtp.transformers_names import cache_name, encoded_images, name_cache

STATE = "_ocvtp_state"


@dataclass
class State:
    """What an attached model carries."""

    host: Host
    pruner: Pruner
    needs: Needs
    positions: Positions
    on_prune: Callable[[Prompt], None] | None
    reader: Reader | None = None
    layers: LayerPruner | None = None
    encode: Encode = encode_anew
    select: Select = select
    logits: Logits = "short"
    keeps_all: bool = False
    cache_name: str = field(default_factory=cache_name)
    hooks: InstalledHooks = field(init=False)

    def shorten(self, inputs: dict[str, Any], whole: bool = False) -> Shortened:
        """The short inputs and the prompt, reported; `whole`: see `look`."""
        self.hooks.renew()
        seen = look(self.host, self.needs, inputs, self.reader, self.encode, whole)
        settings = (self.positions, self.layers, self.select)
        short = shorten(self.host, self.pruner, inputs, seen, *settings)
        if self.on_prune is not None:
            self.on_prune(short.prompt)
        return short


@dataclass
class _Running:
    """A generate() on its way: `num_read` of the short prompt's columns went into the model."""

    model: Any
    prompt: Prompt
    num_read: int = 0

    def check(self) -> None:
        """Refuse an answer to something else."""
        if self.num_read < self.prompt.short_length:
            raise ValueError(
                "generate() did not read the prompt that it was given, so the images are not in"
                " the answer; leave out what rewrites prompts, e.g. token_healing."
            )


_RUNNING: ContextVar[_Running | None] = ContextVar("ocvtp_running", default=None)
_TUPLE: ContextVar[bool] = ContextVar("ocvtp_tuple", default=False)
"""Whether the model around the one that prunes will hand back a tuple."""


def forward(model: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    """`model.forward`, images pruned; or a step of generate(), which pruned them already."""
    state: State = model.__dict__[STATE]
    kwargs = name_cache(kwargs, state.cache_name)
    ids = kwargs.get("input_ids", args[0] if args else None)
    if len(args) < 2 and not brings_images(kwargs) and (ids is None or ids.shape[1] == 1):
        kwargs = conversation.next_step(kwargs, ids)
        return original(*args, **kwargs)  # every decode step: cheap, and traceable by dynamo
    kwargs = by_name(model, "forward", args, kwargs)
    running = _RUNNING.get()
    if running is not None and running.model is model:  # the ids are short already
        kwargs, deepstack = _splice(running, kwargs)
        is_prompt = kwargs.get("inputs_embeds") is not None
        with handing(deepstack), hooks.reading(running.prompt.layers if is_prompt else None):
            return original(**kwargs)
    if not brings_images(kwargs):
        return original(**conversation.next_step(kwargs, ids))
    if state.logits == "full":  # the inner model prunes, and hands back a state for every column
        token = _TUPLE.set(_wants_tuple(model, kwargs))
        try:
            return original(**kwargs)
        finally:
            _TUPLE.reset(token)
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise ValueError(
            "logits_to_keep is a tensor of token numbers, which pruning changes; pass an int, or"
            " attach with logits='full'."
        )
    return pruned(state, model, original, kwargs)


def _wants_tuple(module: Any, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("return_dict")
    return not (getattr(module.config, "return_dict", True) if given is None else given)


def pruned(state: State, module: Any, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Run a forward() that brings images on the short prompt.

    Args:
        state: of the attached model.
        module: that model, or the one inside it that has no head.
        original: its forward().
        kwargs: of the call.
    """
    if generate_arguments.cache_length(kwargs):
        raise ValueError(
            "forward() got images and a filled cache while a pruner is attached: the attention"
            " mask would not match the short cache. Use generate(), or pass the images with an"
            " empty cache."
        )
    is_tuple = _wants_tuple(module, kwargs)
    # In a tuple, what is missing would move what stands behind it.
    short = state.shorten(kwargs, whole=is_tuple or _TUPLE.get() or state.keeps_all)
    prompt, inputs = short.prompt, short.inputs | {"input_ids": None}
    inputs["inputs_embeds"] = prompt.embeddings
    if is_tuple:
        inputs["return_dict"] = True
    state.host.set_rope_deltas(prompt.rope_deltas)
    with handing(prompt.deepstack), hooks.reading(prompt.layers):
        output = original(**inputs)
    conversation.remember(output, kwargs, prompt)
    output = forward_output.finish(output, short, lengthen=state.logits == "full")
    return output.to_tuple() if is_tuple else output


@torch.no_grad()
def generate(model: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    """`model.generate` on the short prompt, in the terms of the caller's."""
    state: State = model.__dict__[STATE]
    kwargs = name_cache(by_name(model, "generate", args, kwargs), state.cache_name)
    inputs = kwargs.get("inputs")
    if isinstance(inputs, Tensor) and inputs.ndim == 2 and kwargs.get("input_ids") is None:
        kwargs["input_ids"] = kwargs.pop("inputs")
    running, remembered = None, conversation.remembered_prompt(kwargs)
    if remembered is not None:  # a later turn: the images are in the cache
        state.hooks.renew()
        turn, full_ids = conversation.later_turn(state.host, remembered, kwargs)
        shown = generate_arguments.Shown(full_ids, turn["input_ids"].shape[1])
        deltas = remembered.rope_deltas
    elif not brings_images(kwargs):
        return original(**kwargs)
    else:
        kwargs["attention_mask"] = mask = generate_arguments.given_or_inferred_mask(model, kwargs)
        if mask is None and kwargs.get("position_ids") is not None:  # no packed samples here
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        if state.layers is not None:
            generate_arguments.check_layers(model, kwargs)
        short = state.shorten(kwargs)
        turn, prompt = short.inputs, short.prompt
        shown = generate_arguments.Shown(prompt.input_ids, prompt.short_length)
        running, deltas = _Running(model, prompt), prompt.rope_deltas
    generate_arguments.adjust(model, turn, shown)
    token = _RUNNING.set(running)
    state.host.set_rope_deltas(deltas)
    try:
        with caller_processors.reading(turn, shown) as turn:
            output = original(**turn)
    finally:
        _RUNNING.reset(token)
        state.host.set_rope_deltas(deltas)  # drafts of an assistant may have changed them
    if running is not None:
        running.check()
        conversation.remember(output, turn, running.prompt)
    return generate_arguments.restore(output, shown)


def by_name(model: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a method by their names."""
    names = list(inspect.signature(getattr(type(model), name)).parameters)[1:] if args else []
    return dict(zip(names, args, strict=False)) | kwargs


def brings_images(kwargs: dict[str, Any]) -> bool:
    """Whether a call has images, or videos, to encode."""
    given = (kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
    return any(given) or bool(encoded_images(kwargs))


def _splice(running: _Running, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Deepstack | None]:
    """Put the prepared embeddings where this forward sees tokens of the short prompt."""
    prompt, ids = running.prompt, kwargs.get("input_ids")
    past = generate_arguments.cache_length(kwargs)
    if ids is None or past >= prompt.short_length:
        return kwargs, None
    here = slice(past, past + ids.shape[1])
    repeats, rest = divmod(ids.shape[0], prompt.short_ids.shape[0])
    expected = prompt.short_ids[:, here].repeat_interleave(max(repeats, 1), dim=0)
    head = ids[:, : expected.shape[1]]
    if rest or not torch.equal(expected.to(ids.device), head):
        if bool((ids == running.model.config.image_token_id).any()):
            raise ValueError(
                "generate() ran the model on image placeholders that are not the prompt's (e.g. a"
                " negative prompt with an image); leave them out while a pruner is attached."
            )
        return kwargs, None  # e.g. the text-only branch of classifier-free guidance
    running.num_read = max(running.num_read, past + head.shape[1])
    kwargs = dict(kwargs)
    tail = kwargs.pop("input_ids")[:, expected.shape[1] :]
    embeddings = prompt.embeddings[:, here].repeat_interleave(repeats, dim=0)
    if tail.shape[1]:
        embed = running.model.get_input_embeddings()
        embeddings = torch.cat([embeddings, embed(tail).to(embeddings)], dim=1)
    kwargs["inputs_embeds"] = embeddings
    gapped = prompt.positions is not None and prompt.rope_deltas is None
    if gapped and kwargs.get("attention_mask") is None:
        # An all-ones mask may have been dropped; without one, gaps look like packed sequences.
        kwargs["attention_mask"] = torch.ones(
            ids.shape[0], past + ids.shape[1], dtype=torch.long, device=ids.device
        )
    if prompt.deepstack is None:
        return kwargs, None
    return kwargs, prompt.deepstack.part(here, repeats, tail.shape[1])
