"""Put a pruner into a model and take it out again.

A model gets a few bound methods in the place of its own (`forward`, `generate`), and inert hooks on
some of its modules. `remove()` takes them away, wherever others have moved them. What belongs to
one call lives in local variables and in ContextVars, so that threads do not see each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from ocvtp.choices import Positions, Separators, TileBudget
from ocvtp.hosts.base import Host, Savings, Tiling
from ocvtp.hosts.in_llm import hooks as layer_hooks
from ocvtp.hosts.origin import check_origin, other_weights
from ocvtp.hosts.prompt.checks import beyond_all
from ocvtp.hosts.prompt.clip_text import TextTower
from ocvtp.hosts.prompt.read_call import encode_now
from ocvtp.hosts.prompt.read_prompt import make_reader
from ocvtp.hosts.prompt.select import Select, compiled, select
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.registry import check, find_host, unwrap
from ocvtp.hosts.runtime import caller_processors, calls
from ocvtp.hosts.runtime.attachment import IN_TOWER, Attachment, attachment_of, by_stage
from ocvtp.hosts.runtime.forward_output import Logits, check_logits
from ocvtp.hosts.runtime.installed_hooks import InstalledHooks
from ocvtp.hosts.runtime.shared_encodings import SharedEncodings
from ocvtp.hosts.wrap_methods import Wrapped
from ocvtp.pruners import Compose, Pruner
from ocvtp.pruners.budgets import BUDGETS, Budget
from ocvtp.pruners.layer_pruner import LayerPruner
from ocvtp.structures import Needs
from ocvtp.towers.hooks import Hook
from ocvtp.transformers_names import MERGE_PROCESSORS, warn_if_untested


class Handle:
    """An attached pruner; `remove()` takes it out, and may be called more than once.

    Args:
        attachment: what the model carries.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self.savings = attachment.savings
        """Which of the wanted savings have an effect with this pruner in this model."""

    def remove(self) -> None:
        """Leave the model as it was."""
        self._attachment.remove()


def attach(
    model: Any,
    pruner: Pruner | Compose,
    *,
    processor: Any = None,
    text_tower: TextTower = None,
    positions: Positions | None = None,
    budget: TileBudget = "per_image",
    separators: Separators = "rows",
    on_prune: Callable[[Prompt], None] | None = None,
    shared: SharedEncodings | None = None,
    savings: Savings | None = None,
    logits: Logits = "short",
    num_keep: int | None = None,
    keep_ratio: float | None = None,
    max_keep: int | None = None,
) -> Handle:
    """Prune the visual tokens of every call of `model(...)` and `model.generate(...)`.

    A call may say another budget: `model.generate(**inputs, num_keep=64)`, or `num_keep=[64, 128]`,
    a value for each row of input_ids; so may `keep_ratio` and `max_keep`. Nothing of it is left
    for the next call, and other threads do not see it.

    Args:
        model: a supported transformers VLM, or what holds one: PEFT, DDP, FSDP, torch.compile,
            Fabric, DeepSpeed, a LightningModule.
        pruner: see `ocvtp.build_pruner`; or a `Compose` of several stages. An image of fewer
            tokens than `num_keep` stays as it is; if all images are so small, a warning says it.
        processor: the processor (or tokenizer) that makes the model's inputs, for pruners that read
            the prompt: it tells the user's words from the chat template; and for those that read
            pixels: it says how they were normalised. None looks for the one saved with the model.
        text_tower: for pruners that compare images with the prompt by CLIP: hub id or folder of the
            CLIP that the vision tower is from, a `CLIPModel`, or a pair `(CLIPModel, tokenizer)`.
            None looks for it on this machine.
        positions: `contiguous` numbers the tokens that are left from 0; `original` leaves each
            token the position that it had; None is what the pruner was trained with, and else
            `contiguous`. Models that turn tokens by their place in the image (Qwen-VL) always keep
            those.
        budget: where a model cuts images into tiles, `num_keep` is that of the image (`per_image`)
            or of every tile (`per_tile`: pruners see each as an image of its own).
        separators: where a model ends the rows of images with newline tokens: `rows` keeps those
            of rows that kept a token, or `all`, or `none`; they do not count as visual tokens.
        on_prune: called with every shortened prompt, e.g. to count tokens.
        shared: reuses what the vision tower made of the same images under other pruners, unless
            they act before or inside the tower. None encodes in every call.
        savings: what need not run while a pruner is attached; None is `Savings()`.
        logits: which columns the output of `model(...)` has. `short`: those that are left, L', with
            the labels of a call as `output.labels` [B, L']. `full`: the caller's, L, for
            trainers that line them up with labels of their own; a dropped column has the values of
            the last kept one before it. See docs/training-with-a-pruner.md.
        num_keep: the budget in place of the pruner's own, which stays as it is. keep_ratio: the
            same as a share. max_keep: the same as a cap.

    Returns:
        a handle whose `remove()` leaves the model as it was.

    Raises:
        ValueError: if the model is not supported, one of several, or has a pruner already, or
            cannot supply what the pruner needs; or if `shared` was made for another model or other
            pruners.
    """
    warn_if_untested()
    model = unwrap(model)
    _check_free(model)
    given, pruner = pruner, _at(pruner, Budget(num_keep, keep_ratio, max_keep))
    positions = trained_positions(pruner) if positions is None else positions
    _check_positions(positions)
    check_logits(logits)
    host = find_host(model, Tiling(budget, separators), savings)
    _check_all(host, pruner)
    needs, parts = pruner.tower_needs, by_stage(pruner)
    host.set_stages([parts[stage] for stage in IN_TOWER if stage in parts], needs, processor)
    encode, looked_for = (encode_now, needs) if shared is None else shared.join(model, pruner)
    chosen = parts.get("llm_input")
    run: Select = select if chosen is None or not host.savings.compile_select else compiled(chosen)
    attachment = Attachment(
        host=host,
        given=given,
        pruner=pruner,
        parts=parts,
        needs=needs,
        positions=positions,
        on_prune=on_prune,
        reader=make_reader(host, needs, processor, text_tower),
        encode=encode,
        select=run,
        logits=logits,
        keeps_all=pruner.name == "none" and shared is None,
    )
    attachment.savings = replace(host.savings_for(looked_for), compile_select=run is not select)
    attachment.hooks = _installed_hooks(attachment, pruner, looked_for)
    attachment.put()
    return Handle(attachment)


def _at(pruner: Pruner | Compose, budget: Budget) -> Pruner | Compose:
    return pruner.with_budget(budget) if budget.settings() else pruner


def _check_positions(positions: Positions) -> None:
    if positions not in get_args(Positions):
        raise ValueError(f"positions={positions!r}; pass 'contiguous' or 'original'.")


def trained_positions(pruner: Pruner | Compose) -> Positions:
    """Of the tokens that are left, where nobody says: as it was trained, and else contiguous."""
    wanted = (part.prompt_positions for part in pruner.parts)
    return next((positions for positions in wanted if positions is not None), "contiguous")


def _installed_hooks(
    attachment: Attachment, pruner: Pruner | Compose, needs: Needs
) -> InstalledHooks:
    host = attachment.host
    methods = [(calls.forward, "forward"), (calls.generate, "generate")]
    groups = [partial(_method, host.model, *method, attachment) for method in methods]
    groups.append(partial(_inner_method, host.model, attachment))
    if hasattr(type(host.model), MERGE_PROCESSORS):
        groups.append(partial(_method, host.model, caller_processors.merge, MERGE_PROCESSORS))
    groups.append(partial(_hooks, host, needs, attachment.layers))
    settings = partial(_hook_settings, host, attachment.layers)
    return InstalledHooks(host.model, partial(check, host, pruner), groups, settings)


def _hook_settings(host: Host, layered: LayerPruner | None) -> Any:
    """What decides where hooks go besides the modules of the model."""
    found = None
    if layered is not None:
        found = layered.needs_by_layer(len(host.language_model.layers))
    return host.hook_settings, found


def _hooks(host: Host, needs: Needs, layered: LayerPruner | None) -> list[Hook]:
    hooks = host.hooks(needs)
    if layered is not None:
        hooks += layer_hooks.hooks(host.language_model, layered)
    return hooks


def _method(model: Any, function: Callable[..., Any], name: str, *given: Any) -> list[Hook]:
    """Runs `function` in the place of a method of a model."""
    return [Hook(model, partial(Wrapped, function, model, *given, name=name))]


def _inner_method(model: Any, attachment: Attachment) -> list[Hook]:
    """For the forward() of the model without a head, inside of `model`."""
    return _method(model.model, calls.inner_forward, "forward", attachment)


def _check_free(model: Any) -> None:
    if attachment_of(model) is not None:
        raise ValueError(
            "a pruner is attached to this model already; remove it first (handle.remove(), or"
            " leave its `with` block)."
        )


def _check_all(host: Host, pruner: Pruner | Compose) -> None:
    """The checks, and warnings where it would drop nothing or was trained in another model."""
    check(host, pruner)
    check_origin(host, pruner)
    for why in (beyond_all(host, pruner), other_weights(host, pruner)):
        if why is not None:
            warnings.warn(why, stacklevel=3)


@contextmanager
def attached(model: Any, pruner: Pruner | Compose, **options: Any) -> Iterator[Handle]:
    """`attach` inside a `with` block; removed at its end, also after an exception.

    Where the same pruner is attached already, and the options are a budget alone, it stays
    attached: calls of this thread inside the block have that budget.
    """
    there = attachment_of(unwrap(model))
    if there is not None and there.given is pruner and options and {*options} <= {*BUDGETS}:
        budget = Budget(**options)
        with there.inside_block(budget) if budget.settings() else nullcontext():
            yield Handle(there)
        return
    handle = attach(model, pruner, **options)
    try:
        yield handle
    finally:
        handle.remove()
