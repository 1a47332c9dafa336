"""What a pruned forward hands back: the bare model's fields, and the columns that were asked for.

B rows, L columns of the prompt, L' of the short one, V words.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix.families import BATCH, EVERY_FAMILY, FAMILIES, Family
from reference import Scripted, Side, assert_close
from test_packed import pack, samples
from test_padding import answered, batch, by_content, log_probs
from torch import Tensor
from torch.nn.functional import cross_entropy

from ocvtp import Pruner, Selection, VisualTokens, attach, build_pruner
from ocvtp.hosts.base import Savings

pytestmark = pytest.mark.sampled(2)

FAMILY = pytest.mark.parametrize("family", EVERY_FAMILY)
WHOLE = Savings(cut_tower=False, project_kept=False)
GONE = ("last_hidden_state",)
"""Of a tower whose last blocks nobody reads."""


def pruner() -> Pruner:
    return Scripted(choose=by_content, num_keep=5)


def everything(tokens: VisualTokens) -> Selection:
    return Selection(torch.arange(tokens.num_tokens).repeat(len(tokens.features), 1), tokens.valid)


keep_all = Scripted(choose=everything, num_keep=1)
"""Nobody knows that it does before it did."""


def same(actual: Any, expected: Any, gone: tuple[str, ...] = ()) -> None:
    """Equal bit for bit, down to the last field; those that are `gone` may be None."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert actual.equal(expected)
    elif hasattr(expected, "to_tuple"):
        assert set(expected.keys()) - set(actual.keys()) <= set(gone)
        assert set(actual.keys()) <= set(expected.keys())
        for name, value in actual.items():
            same(value, expected[name], gone)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            if one is not None or not gone:
                same(one, other, gone)
    elif not hasattr(expected, "get_seq_length"):
        assert actual == expected


@pytest.mark.sampled(1)
@FAMILY
@pytest.mark.parametrize("logits", ["short", "full"])
@torch.no_grad()
def test_keeping_all_hands_back_what_the_bare_model_does(family: Family, logits: Any) -> None:
    inputs = family.make(BATCH, "left")
    labels = inputs["input_ids"]
    for settings in ({}, {"output_hidden_states": True}, {"labels": labels}, {"use_cache": False}):
        bare = family.model(**inputs, **settings)
        values = family.model(**inputs, **settings, return_dict=False)
        inner = {k: v for k, v in settings.items() if k != "labels"}
        headless = family.model.model(**inputs, **inner)
        with build_pruner("none")(family.model, logits=logits):
            same(family.model(**inputs, **settings), bare)
            same(family.model(**inputs, **settings, return_dict=False), values)
            same(family.model.model(**inputs, **inner), headless)
            same(family.model.model(**inputs, return_dict=False, **inner), headless.to_tuple())
        with keep_all(family.model, logits=logits):
            same(family.model(**inputs, **settings), bare, GONE)
            same(family.model(**inputs, **settings, return_dict=False), values)
        with keep_all(family.model, logits=logits, savings=WHOLE):
            same(family.model(**inputs, **settings), bare)


def rows_of(output: Any) -> list[Tensor]:
    """What an output says that the language model read of the images."""
    if "image_outputs" in output.keys():
        return list(output.image_outputs.pooler_output)
    return [output.image_hidden_states]


@FAMILY
@torch.no_grad()
def test_of_images_the_rows_that_were_read_are_handed_back(family: Family) -> None:
    inputs, prompts = family.make(BATCH, "left"), list[Any]()
    bare = family.model(**inputs)
    for logits in ("short", "full"):
        with pruner()(family.model, logits=logits, on_prune=prompts.append):
            output = family.model(**inputs)
        prompt = prompts.pop()
        assert set(output.keys()) == set(bare.keys())
        is_image = prompt.short_ids == family.model.config.image_token_id
        if {"image_outputs", "image_hidden_states"} & set(bare.keys()):
            read = prompt.embeddings[is_image & prompt.short_mask]
            assert torch.cat(rows_of(output)).equal(read)
            assert len(rows_of(output)) == len(rows_of(bare))
        if "image_outputs" in bare.keys() and "deepstack_features" in bare.image_outputs:
            deep = output.image_outputs.deepstack_features
            layers = [torch.cat(list(layer)) for layer in deep]
            assert torch.stack(layers).equal(prompt.deepstack.rows)
        assert prompt.encoded.output is None


@torch.no_grad()
def test_what_a_tower_did_not_run_is_not_handed_back() -> None:
    family = FAMILIES[0]
    inputs = family.make(BATCH, "left")
    bare = family.model(**inputs)
    if "image_outputs" not in bare.keys():
        pytest.skip("this version of transformers hands back rows alone")
    with build_pruner("vprune", keep_ratio=0.5)(family.model):
        tower = family.model(**inputs).image_outputs
        assert tower.keys() == {"pooler_output"}
    with pruner()(family.model):
        tower = family.model(**inputs).image_outputs
        assert tower.keys() == {"pooler_output"}
        states = family.model(**inputs, output_hidden_states=True).image_outputs.hidden_states
        layer = family.model.config.vision_feature_layer % len(states)
        assert states[layer].equal(bare.image_outputs.hidden_states[layer])


@FAMILY
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_full_logits_repeat_those_before_what_was_dropped(family: Family, side: Side) -> None:
    inputs, prompts = batch(family, side), list[Any]()
    with pruner()(family.model):
        short = family.model(**inputs, output_hidden_states=True)
    with pruner()(family.model, logits="full", on_prune=prompts.append):
        full = family.model(**inputs, output_hidden_states=True)
        kept = family.model(**inputs, logits_to_keep=9)
        columns = torch.tensor([1, 7, 8, 30])
        chosen = family.model(**inputs, logits_to_keep=columns)
        values = family.model(**inputs, return_dict=False)
    keep = prompts[0].keep
    assert full.logits.shape[:2] == keep.shape
    for row, own in enumerate(keep):
        last, real = None, inputs["attention_mask"][row].bool()
        mine = iter(short.logits[row, prompts[0].short_mask[row]])
        for column in real.nonzero()[:, 0].tolist():
            last = next(mine) if own[column] else last
            assert_close(full.logits[row, column], last, 1e-5)
    assert values[0].equal(full.logits)
    assert_close(kept.logits, full.logits[:, -9:], 1e-5)
    assert_close(chosen.logits, full.logits[:, columns], 1e-5)
    assert len(full.hidden_states) == len(short.hidden_states)
    for long, few in zip(full.hidden_states, short.hidden_states, strict=True):
        assert long[keep].equal(few[prompts[0].short_mask])
    lengthened = prompts[0].lengthen(short.logits)
    assert_close(lengthened, full.logits, 1e-5)


@FAMILY
@pytest.mark.parametrize("name", ["by content", "fastv"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_the_same_either_way(family: Family, side: Side, name: str) -> None:
    inputs = batch(family, side)
    image = inputs["input_ids"] == family.model.config.image_token_id
    real = inputs["attention_mask"].bool()
    first = real & (real.long().cumsum(dim=1) == 1)  # nothing tells it
    labels = inputs["input_ids"].masked_fill(image | ~real | first, -100)
    made = pruner() if name == "by content" else build_pruner("fastv", stages=((2, 3),))
    prompts: list[Any] = []
    with torch.no_grad():
        with made(family.model, on_prune=prompts.append):
            short = family.model(**inputs, labels=labels)
        with made(family.model, logits="full"):
            full = family.model(**inputs, labels=labels)
            states = family.model.model(**inputs).last_hidden_state
    assert short.labels.shape == short.logits.shape[:2]
    assert short.labels.equal(prompts[0].shorten(labels, -100))
    assert not hasattr(full, "labels")
    assert_close(full.loss, short.loss, 1e-5)
    assert_close(family.model.lm_head(states), full.logits, 1e-6)
    for output, own in ((short, short.labels), (full, labels)):
        by_hand = cross_entropy(output.logits[:, :-1].flatten(0, 1), own[:, 1:].flatten())
        assert_close(by_hand, short.loss, 1e-6)


@FAMILY
@torch.no_grad()
def test_full_logits_of_answers_and_of_packed_samples(family: Family) -> None:
    inputs, real = answered(batch(family, "left"))
    count = real.shape[1]
    ids = inputs["input_ids"][:, -count:]
    packed = pack(family, *samples(family))
    with pruner()(family.model):
        short = log_probs(family.model(**inputs).logits[:, -count - 1 :], ids)
        apart = family.model(**packed).logits
    prompts: list[Any] = []
    with pruner()(family.model, logits="full", on_prune=prompts.append):
        full = log_probs(family.model(**inputs, logits_to_keep=count + 1).logits, ids)
        together = family.model(**packed).logits
    assert_close(full[real], short[real], 1e-4)
    assert_close(together[prompts[1].keep], apart[0], 1e-5)


@FAMILY
@torch.no_grad()
def test_the_model_without_its_head_is_pruned_too(family: Family) -> None:
    inputs, prompts = family.make(BATCH, "left"), list[Any]()
    with pruner()(family.model, on_prune=prompts.append):
        logits = family.model(**inputs).logits
        output = family.model.model(**inputs)
        positional = family.model.model(inputs["input_ids"], **{
            name: value for name, value in inputs.items() if name != "input_ids"
        })  # fmt: skip
        text = family.model.model(inputs["input_ids"][1:2, -9:]).last_hidden_state
    assert output.last_hidden_state.shape[1] == prompts[1].short_length < prompts[1].length
    assert_close(family.model.lm_head(output.last_hidden_state), logits, 1e-6)
    assert positional.last_hidden_state.equal(output.last_hidden_state)
    assert text.equal(family.model.model(inputs["input_ids"][1:2, -9:]).last_hidden_state)
    assert len(prompts) == 3


@torch.no_grad()
def test_the_model_without_its_head_inside_adapters_is_pruned() -> None:
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    family = FAMILIES[0]
    inputs, prompts = family.make(BATCH, "left"), list[Any]()
    model = get_peft_model(deepcopy(family.model), LoraConfig(target_modules=["q_proj"]))
    with pruner()(model, on_prune=prompts.append):
        output = model.get_base_model().model(**inputs)
        assert output.last_hidden_state.shape[1] == prompts[0].short_length
        inputs["attention_mask"] = inputs["attention_mask"][:, None, None]
        with pytest.raises(ValueError, match="pass the 2-D"):
            model.get_base_model().model(**inputs)


def test_generating_is_the_same_either_way() -> None:
    for family in FAMILIES:
        inputs = family.make(BATCH, "left")
        said = []
        for logits in ("short", "full"):
            with pruner()(family.model, logits=logits):
                said.append(family.model.generate(**inputs, max_new_tokens=4, do_sample=False))
        assert said[0].equal(said[1])


def test_other_kinds_of_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="logits='long'; pass 'short' or 'full'"):
        attach(FAMILIES[0].model, pruner(), logits="long")
