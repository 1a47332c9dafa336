"""Argument sets of forward()."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from matrix.families import ONE, SEVERAL, TEXT
from matrix.generate_arguments import embeddings, hide, hide_word, pad_both, wide_mask
from matrix.keep_all import ARGS, Call, Inputs, Table
from ocvtp.transformers_names import cache_name

FORWARD = Table("forward")

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing beside what the processor returns": {},
    "`logits_to_keep`, a number": {"logits_to_keep": 3},
    "`logits_to_keep=0`": {"logits_to_keep": 0},
    "`output_hidden_states`": {"output_hidden_states": True},
    "`return_dict=False`": {"return_dict": False},
    "`return_dict=True`": {"return_dict": True},
    "`use_cache=False`": {"use_cache": False},
    "`use_cache=True`": {"use_cache": True},
    "`past_key_values=None`": {"past_key_values": None},
    "an argument that nobody knows": {"colour": "red"},
}


def with_settings(settings: dict[str, Any], call: Call) -> Inputs:
    return call.inputs() | settings


for _title, _settings in SETTINGS.items():
    FORWARD(_title)(partial(with_settings, _settings))


@FORWARD("`output_attentions`")
def attentions(call: Call) -> Inputs:
    call.copy().set_attn_implementation("eager")
    return call.inputs() | {"output_attentions": True}


def label(inputs: Inputs) -> Inputs:
    """What the language model is to say: the prompt, images and padding apart."""
    ids = inputs["input_ids"]
    return inputs | {"labels": ids.masked_fill(ids % 100 == 0, -100)}


@FORWARD("`labels`")
def labels(call: Call) -> Inputs:
    return label(call.inputs())


@FORWARD("`labels`, with all of the prompt")
def all_labels(call: Call) -> Inputs:
    inputs = call.inputs()
    return inputs | {"labels": inputs["input_ids"], "use_cache": False}


@FORWARD("`labels`, right padding")
def labels_on_the_left(call: Call) -> Inputs:
    return label(call.inputs(side="right"))


@FORWARD("`labels`, `logits_to_keep`")
def labels_of_few(call: Call) -> Inputs:
    inputs = label(call.inputs())
    return inputs | {"labels": inputs["labels"][:, -4:], "logits_to_keep": 4}


@FORWARD("`labels`, `num_items_in_batch`")
def counted_labels(call: Call) -> Inputs:
    return label(call.inputs()) | {"num_items_in_batch": torch.tensor(17)}


@FORWARD("right padding")
def right_padding(call: Call) -> Inputs:
    return call.inputs(side="right")


@FORWARD("padding on both sides")
def padding_on_both_sides(call: Call) -> Inputs:
    return pad_both(label(call.inputs()))


@FORWARD("padding on both sides, `logits_to_keep`")
def few_of_both_sides(call: Call) -> Inputs:
    return pad_both(call.inputs()) | {"logits_to_keep": 4}


@FORWARD("several images a prompt")
def several(call: Call) -> Inputs:
    return call.inputs(SEVERAL)


@FORWARD("text alone")
def text(call: Call) -> Inputs:
    return call.inputs(TEXT)


@FORWARD("no mask")
def no_mask(call: Call) -> Inputs:
    inputs = call.inputs()
    del inputs["attention_mask"]
    return inputs


@FORWARD("a mask of zeros and ones as `bool`")
def bool_mask(call: Call) -> Inputs:
    inputs = call.inputs()
    return inputs | {"attention_mask": inputs["attention_mask"].bool()}


@FORWARD(
    "`logits_to_keep`, token numbers",
    refused="logits_to_keep is a tensor of token numbers",
    remedy='Pass a number, or attach with `logits="full"`.',
)
def numbered_logits(call: Call) -> Inputs:
    return call.inputs() | {"logits_to_keep": torch.tensor([1, 4, -1])}


@FORWARD(
    "a mask that hides placeholders",
    refused="attention_mask is 0 on .* pass a mask that is 1 on all of them",
    remedy="Pass the mask that the processor makes: the pruner drops tokens.",
)
def hidden(call: Call) -> Inputs:
    return hide(call.inputs())


@FORWARD("a mask that hides a word")
def word_hidden(call: Call) -> Inputs:
    return hide_word(call.inputs())


FORWARD(
    "a mask of four dimensions",
    raises="too many indices",
    refused="attention_mask has 4 dimensions; pass the 2-D one",
    remedy="Pass the mask that the processor makes.",
)(wide_mask)


@FORWARD("`position_ids`")
def positions(call: Call) -> Inputs:
    inputs = call.inputs()
    numbers = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return inputs | {"position_ids": numbers + 3}


@FORWARD("`position_ids`, no mask")
def positions_alone(call: Call) -> Inputs:
    inputs = call.inputs(ONE)
    del inputs["attention_mask"]
    return inputs | {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}


def pack(call: Call) -> Inputs:
    """The rows of a batch one after the other, numbered anew each."""
    whole = call.inputs()
    real = whole["attention_mask"].bool()
    packed = {k: v for k, v in whole.items() if k != "attention_mask"}
    for name in packed.keys() & {"input_ids", "mm_token_type_ids"}:
        packed[name] = packed[name][real][None]
    numbers = torch.cat([torch.arange(n) for n in real.sum(dim=1).tolist()])
    return packed | {"position_ids": numbers[None]}


@FORWARD("rows packed by `position_ids`")
def packed(call: Call) -> Inputs:
    return pack(call) | {"use_cache": False}


@FORWARD("rows packed by `position_ids`, a cache, `labels`")
def packed_with_labels(call: Call) -> Inputs:
    return label(pack(call))


CACHES = {
    "`past_key_values`, empty": ("past_key_values", DynamicCache),
    "the cache by the version's own name": (cache_name(), DynamicCache),
    "`past_key_values`, static": ("past_key_values", StaticCache),
}


def cache(name: str, kind: Any, call: Call) -> Inputs:
    sizes = {"max_cache_len": 200} if kind is StaticCache else {}
    return call.inputs() | {name: kind(config=call.model.config.get_text_config(), **sizes)}


for _title, _given in CACHES.items():
    FORWARD(_title)(partial(cache, *_given))


def step(call: Call, first: Any) -> Inputs:
    """One token more, of which the cache has the rest."""
    return {"input_ids": first.logits[:, -1:].argmax(dim=-1), cache_name(): first[cache_name()]}


@FORWARD("a decode step", then=step)
def steps(call: Call) -> Inputs:
    return call.inputs(ONE)


@FORWARD(
    "images on a filled cache",
    refused=r"forward\(\) got images and a filled cache",
    remedy="Use `generate()`, or pass the images with an empty cache.",
)
def images_on_a_cache(call: Call) -> Inputs:
    filled = call.model(**call.inputs([(7,)]))
    return call.inputs(ONE) | {"attention_mask": None, cache_name(): filled[cache_name()]}


@FORWARD("`input_ids`, positional")
def ids_positional(call: Call) -> Inputs:
    inputs = call.inputs()
    ids = inputs.pop("input_ids")
    return inputs | {ARGS: (ids,)}


@FORWARD("three arguments, positional")
def three_positional(call: Call) -> Inputs:
    names = [*signature(type(call.model).forward).parameters][1:4]
    inputs = call.inputs()
    return {ARGS: tuple(inputs.pop(name, None) for name in names)} | inputs


FORWARD(
    "`inputs_embeds`",
    refused="pass input_ids and pixel_values and leave inputs_embeds out",
    remedy="Pass `input_ids` and `pixel_values`: placeholders are found in them.",
)(embeddings)


@FORWARD("a model in bfloat16")
def bfloat16(call: Call) -> Inputs:
    call.copy().bfloat16()
    inputs = call.inputs()
    return inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}


@FORWARD("autocast", around=lambda: torch.autocast("cpu", torch.bfloat16))
def autocast(call: Call) -> Inputs:
    return call.inputs()


@FORWARD("a model under training")
def training(call: Call) -> Inputs:
    call.copy().train()
    return label(call.inputs())
