"""Drop visual tokens between the layers of the language model.

Hooks before the language model and before its layers do it, while a call that was shortened runs.
What was dropped is noted on the cache, whose layers then differ in length; every later step reads
the note. Nothing of the model's forward is copied.

L' columns of the short prompt, L'' of them left after a stage, T columns read after the prompt in
the same pass (drafts), q columns of a pass.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ocvtp.hosts.base import Host
from ocvtp.hosts.cache_notes import LayersNote, leave_note, notes_on
from ocvtp.hosts.in_llm.column import given_positions
from ocvtp.hosts.in_llm.drop import Pass, drop, prepare
from ocvtp.hosts.in_llm.layer_call import LayerCall
from ocvtp.hosts.in_llm.prompt_state import Current, Place
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.structures import take
from ocvtp.towers.hooks import Hook, after, before
from ocvtp.towers.module_state import is_compiled
from ocvtp.towers.recordings import CALL
from ocvtp.transformers_names import cache_in, is_checkpointed


def check(host: Host, pruner: LayerPruner) -> None:
    """Refuse language models in which tokens cannot be dropped.

    Raises:
        ValueError: that says why, and what to do.
    """
    model = host.language_model
    places = pruner.layers(len(model.layers))
    if is_compiled(model):
        raise ValueError(
            f"{pruner.name} drops tokens inside the language model, whose layers are compiled:"
            " hooks on them would be ignored. Attach it to a model that is not, or use a pruner"
            " that acts before the language model (see `ocvtp list`)."
        )
    if window := getattr(model.config, "sliding_window", None):
        raise ValueError(
            f"{pruner.name} drops tokens inside the language model, whose layers look no further"
            f" back than {window} columns; use a pruner that acts before the language model (see"
            " `ocvtp list`)."
        )
    if places[0] < host.num_deepstack_layers:
        raise ValueError(
            f"{pruner.name} drops tokens before layer {places[0]}, but until layer"
            f" {host.num_deepstack_layers} the language model adds to them what the tower has for"
            f" them; pass stages=((layer, K), ...) from layer {host.num_deepstack_layers} on."
        )


def hooks(model: Any, pruner: LayerPruner) -> list[Hook]:
    """Hooks in the language model.

    Args:
        model: the language model, its `layers` in order.
        pruner: of stage `llm_layers`.
    """
    count = len(model.layers)
    needs = pruner.needs_by_layer(count)
    places = [layer for layer, _ in needs]
    asked = {b for layer, need in needs for b, _ in need.attention if b != layer}
    read = asked | {b for layer, need in needs for b in need.keys if b != layer}
    columns = {need.column for _, need in needs if need.column is not None}
    found = [
        before(model, _before, with_kwargs=True),
        after(model, _end_pass, always_call=True),
    ]
    for number in range(min({*read, *columns, *places}), count):
        hook = partial(_before_layer, number)
        found.append(before(model.layers[number], hook, with_kwargs=True))
    for number in sorted(asked):
        query = model.layers[number].self_attn.q_proj
        found.append(after(query, partial(_keep_queries, number)))
    if columns:
        found.append(before(model.rotary_emb, _keep_positions, with_kwargs=True))
    return found


def _before(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Before the language model: begin a pass, if tokens are or were dropped."""
    call, cache = CALL.get(), cache_in(kwargs)
    if type(call) is LayerCall:  # of a step that Ctrl-C ended: torch runs no hooks after that
        CALL.set(call := call.around)
    if isinstance(call, LayerCall):
        call.layer_pass = None
    plan = call.plan if isinstance(call, LayerCall) else None
    past = 0 if cache is None else cache.get_seq_length()
    note = notes_on(cache).layers
    if not past and note is not None:  # emptied, and filled with another prompt
        leave_note(cache, layers=None)
        note = None
    if plan is None and note is None:
        return
    embeddings, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
    batch, num_columns, _ = embeddings.shape
    if plan is not None:
        plan = plan.repeat(batch)
        note = LayersNote(plan.mask.shape[1])
    assert note is not None
    if getattr(cache, "is_compileable", False) or not (mask is None or mask.ndim == 2):
        raise ValueError(
            "tokens dropped inside the language model leave its layers with caches of different"
            " lengths, which a static cache cannot hold; leave cache_implementation out."
        )
    num_tail = past + num_columns - note.prompt_length
    tail = None if mask is None else mask[:, note.prompt_length :].bool()
    current = None if plan is None else Current.start(plan, embeddings, num_tail)
    positions = _plain_positions(kwargs, past, num_columns)
    run = Pass(model, note, plan, positions, tail, num_tail, current)
    if not isinstance(call, LayerCall):  # a step of the caller, on a cache that we filled
        CALL.set(call := LayerCall(around=call))
    call.layer_pass = run


def _plain_positions(kwargs: dict[str, Any], past: int, num_columns: int) -> Tensor | None:
    """[1 or B, q]; None where tokens have several coordinates."""
    given: Tensor | None = kwargs.get("position_ids")
    if given is None:
        device = kwargs["inputs_embeds"].device
        return torch.arange(past, past + num_columns, device=device)[None]
    return given if given.ndim == 2 else None


def _end_pass(model: Any, args: Any, output: Any) -> Any:
    """After the language model: end the pass, and give every column of the prompt a state.

    A dropped token has the state of the one before it: the next token is predicted from there.
    """
    if not isinstance(call := CALL.get(), LayerCall):
        return output
    run, call.layer_pass = call.layer_pass, None
    if type(call) is LayerCall:
        CALL.set(call.around)
    if run is None or run.current is None or output is None:
        return output
    states = output[0]
    whole = take(states, run.current.spread().to(states.device))
    if isinstance(output, tuple):
        return (whole, *output[1:])
    output.last_hidden_state = whole
    return output


def _device(layer: Any, hidden: Tensor) -> torch.device:
    """Where accelerate will run a layer; its weights may be read before that."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return hidden.device if device is None else torch.empty(0, device=device).device


def _running() -> Pass | None:
    call = CALL.get()
    return call.layer_pass if isinstance(call, LayerCall) else None


def _keep_queries(number: int, module: Any, args: Any, output: Tensor) -> None:
    run = _running()
    if run is not None and run.current is not None:
        run.current.queries[number] = output.detach()


def _keep_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    run = _running()
    if run is not None and run.current is not None and run.current.positions is None:
        run.current.positions = given_positions(args, kwargs)


def _before_layer(number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a layer: drop tokens, or hand over the mask for what is left."""
    run = _running()
    if run is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    current = run.current
    if run.cache is None:
        run.cache = _cache(run, kwargs)
    if current is not None:
        assert run.plan is not None
        if number in run.plan.layers:
            hidden = hidden.to(_device(layer, hidden))
            rope = current.rope if run.note.stages else kwargs["position_embeddings"]
            hidden = drop(run, Place(run.model, number, layer, hidden, run.cache, rope))
    layers = [*run.note.stages]
    num_passed = bisect_right(layers, number)
    if num_passed:
        stage = layers[num_passed - 1]
        if stage not in run.prepared:
            run.prepared[stage] = prepare(run, stage, number, hidden, kwargs)
        mask, rope = run.prepared[stage]
        # Without position_ids: gaps in them would be read as packed sequences.
        kwargs = kwargs | {
            "attention_mask": mask,
            "position_embeddings": rope,
            "position_ids": None,
        }
    if current is not None:
        current.ropes[number] = kwargs["position_embeddings"]
    if args:
        return (hidden, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hidden}


def _cache(run: Pass, kwargs: dict[str, Any]) -> Any:
    """The cache of a pass, by the arguments of its first layer that has a hook."""
    cache = cache_in(kwargs)
    if cache is None or any(map(is_checkpointed, run.model.layers)):
        raise ValueError(
            "tokens can be dropped inside the language model only with a cache; leave"
            " use_cache=False out, and call gradient_checkpointing_disable() where layers run again"
            " in the backward pass, or use a pruner that acts before the language model (see"
            " `ocvtp list`)."
        )
    if run.current is not None:
        leave_note(cache, layers=run.note)
    return cache


def deepstack_hook(language_model: nn.Module) -> Hook:
    """An inert hook on a language model, which takes the rows that a call hands to it."""
    return before(language_model, _add, with_kwargs=True)


def _add(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if torch.compiler.is_compiling() and kwargs["inputs_embeds"].shape[1] == 1:
        return None  # a decode step takes nothing; dynamo need not follow the ContextVar
    call = CALL.get()
    if not isinstance(call, LayerCall) or call.deepstack is None:
        return None
    call.has_added = True
    return args, kwargs | call.deepstack.arguments()
