"""What an attached model runs in place of its forward() and generate().

A forward() that brings images: its prompt is shortened, and the model runs on the prepared
embeddings. generate() shortens once; its own calls of forward() then find the short prompt in the
`Call` that they are part of. All other calls run as always.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.runtime import conversation, forward_output, generate_arguments
from ocvtp.hosts.runtime.attachment import Attachment
from ocvtp.hosts.runtime.call import Call
from ocvtp.hosts.runtime.call_budgets import CallBudgets, inside_block, take_budgets
from ocvtp.hosts.runtime.caller_processors import with_assistant
from ocvtp.hosts.wrap_methods import Original
from ocvtp.pruners.budgets import BUDGETS
from ocvtp.towers.module_state import uncompiled
from ocvtp.towers.recordings import CALL
from ocvtp.transformers_names import brings_images, cache_in, cache_length, name_cache

_shorten = uncompiled(Attachment.shorten)
"""Eagerly in compiled code too, of which it would make graphs that end at every choice."""


def forward(
    model: Any, original: Original, attachment: Attachment, *args: Any, **kwargs: Any
) -> Any:
    """`model.forward`, images pruned; or a step of generate(), which pruned them already."""
    kwargs = name_cache(kwargs, attachment.cache_name)
    ids = kwargs.get("input_ids", args[0] if args else None)
    is_step = not brings_images(kwargs) and (ids is None or ids.shape[1] == 1)
    if is_step and len(args) < 2 and not _says_budget(kwargs):
        kwargs = conversation.next_step(kwargs, ids)
        return original(*args, **kwargs)  # every decode step: cheap, and traceable by dynamo
    if args:
        kwargs = _by_name(model, "forward", args, kwargs)
    kwargs, budgets = take_budgets(kwargs, attachment.with_budget)
    call = CALL.get()
    if isinstance(call, Call) and call.model is model and call.prompt is not None:
        kwargs, deepstack = call.step(kwargs, cache_length(kwargs))  # the ids are short already
        plan = None if kwargs.get("inputs_embeds") is None else call.prompt.layers
        with call.reading(plan, deepstack):
            return original(**kwargs)
    if not brings_images(kwargs):
        conversation.refuse_budgets(budgets, kwargs)
        return original(**conversation.next_step(kwargs, ids))
    if attachment.logits == "full":  # the inner model prunes, and hands back all columns
        block = nullcontext() if budgets is None else inside_block(attachment, budgets)
        with Call(model, wants_tuple=_wants_tuple(model, kwargs)).on_its_way(), block:
            return original(**kwargs)
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise ValueError(
            "logits_to_keep is a tensor of token numbers, which pruning changes; pass an int, or"
            " attach with logits='full'."
        )
    return _pruned(attachment, model, original, kwargs, budgets)


def inner_forward(
    module: Any, original: Original, attachment: Attachment, *args: Any, **kwargs: Any
) -> Any:
    """`forward` of the model without a head, which trainers and embedders call.

    Args:
        module: the one without a head.
        original: its own.
        attachment: of the model around it.
        args: of the call. kwargs: of the call.
    """
    if len(args) < 2 and not brings_images(kwargs) and not _says_budget(kwargs):
        return original(*args, **kwargs)
    if args:
        kwargs = _by_name(module, "forward", args, kwargs)
    kwargs = name_cache(kwargs, attachment.cache_name)
    kwargs, budgets = take_budgets(kwargs, attachment.with_budget)
    if not brings_images(kwargs):
        conversation.refuse_budgets(budgets, kwargs)
        return original(**kwargs)
    return _pruned(attachment, module, original, kwargs, budgets)


def _pruned(
    attachment: Attachment,
    module: Any,
    original: Callable[..., Any],
    kwargs: dict[str, Any],
    budgets: CallBudgets | None,
) -> Any:
    """Run a forward() that brings images on the short prompt.

    Args:
        attachment: of the attached model.
        module: that model, or the one inside it that has no head.
        original: its forward().
        kwargs: of the call.
        budgets: that it says.
    """
    if cache_length(kwargs):
        raise ValueError(
            "forward() got images and a filled cache while a pruner is attached: the attention"
            " mask would not match the short cache. Use generate(), or pass the images with an"
            " empty cache."
        )
    around, is_tuple = CALL.get(), _wants_tuple(module, kwargs)
    # In a tuple, a missing part would move all that follow.
    whole = is_tuple or attachment.keeps_all or (isinstance(around, Call) and around.wants_tuple)
    call = Call(attachment.host.model)
    with call.on_its_way():
        short = _shorten(attachment, kwargs, whole, budgets)
        prompt, inputs = short.prompt, short.inputs | {"input_ids": None}
        inputs["inputs_embeds"] = prompt.embeddings
        if is_tuple:
            inputs["return_dict"] = True
        attachment.host.set_rope_deltas(prompt.rope_deltas)
        with call.reading(prompt.layers, prompt.deepstack):
            output = original(**inputs)
    conversation.remember(output, kwargs, prompt)
    output = forward_output.finish(output, short, lengthen=attachment.logits == "full")
    return output.to_tuple() if is_tuple else output


@torch.no_grad()
def generate(
    model: Any, original: Original, attachment: Attachment, *args: Any, **kwargs: Any
) -> Any:
    """`model.generate` on the short prompt; what the caller gives and gets is of the whole one."""
    if args:
        kwargs = _by_name(model, "generate", args, kwargs)
    kwargs = name_cache(kwargs, attachment.cache_name)
    inputs = kwargs.get("inputs")
    if isinstance(inputs, Tensor) and inputs.ndim == 2 and kwargs.get("input_ids") is None:
        kwargs["input_ids"] = kwargs.pop("inputs")
    kwargs, budgets = take_budgets(kwargs, attachment.with_budget)
    cache, has_images = cache_in(kwargs), brings_images(kwargs)
    has_pixels = kwargs.get("pixel_values") is not None
    note, prompt = conversation.remembered_prompt(cache, has_pixels), None
    conversation.refuse_budgets(budgets, kwargs)
    if note is not None:  # a later turn: the images are in the cache
        attachment.hooks.renew()
        turn, shown = conversation.later_turn(attachment.host, note, kwargs)
        deltas = note.rope_deltas
    elif not has_images:
        return original(**kwargs)
    else:
        kwargs["attention_mask"] = mask = generate_arguments.given_or_inferred_mask(model, kwargs)
        if mask is None and kwargs.get("position_ids") is not None:  # no packed samples here
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        if attachment.layers is not None:
            generate_arguments.check_layers(model, kwargs)
        short = attachment.shorten(kwargs, budgets=budgets)
        turn, prompt = short.inputs, short.prompt
        shown = generate_arguments.Shown(prompt.input_ids, turn["input_ids"].shape[1])
        deltas = prompt.rope_deltas
    generate_arguments.adjust(model, turn, shown)
    if (callers := generate_arguments.callers_of(turn, shown)) is not None:
        turn = with_assistant(turn)
    call = Call(model, prompt, callers)
    attachment.host.set_rope_deltas(deltas)
    with call.on_its_way():
        try:
            output = original(**turn)
        finally:
            attachment.host.set_rope_deltas(deltas)  # drafts of an assistant may have changed them
    if callers is not None:
        callers.check_found()
    call.check_read()
    if prompt is not None:
        conversation.remember(output, turn, prompt)
    return generate_arguments.restore(output, shown)


def _by_name(
    model: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    names = list(inspect.signature(getattr(type(model), name)).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def _says_budget(kwargs: dict[str, Any]) -> bool:
    return any(name in kwargs for name in BUDGETS)


def _wants_tuple(module: Any, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("return_dict")
    return not (getattr(module.config, "return_dict", True) if given is None else given)
