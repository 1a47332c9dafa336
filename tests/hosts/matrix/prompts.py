"""What generate() and forward() make of prompts, and every way of decoding."""

from __future__ import annotations

from copy import deepcopy

import torch
from reference import assert_close
from tiny_models import IMAGE_TOKEN, VOCABULARY

from matrix.checks import (
    DICTIONARY,
    GREEDY,
    NUM_NEW,
    answer,
    by_hand,
    check_greedy,
    check_like_the_host,
    feature,
    pruner,
)
from matrix.families import BATCH, SEVERAL, TEXT, Family
from ocvtp import build_pruner
from ocvtp.hosts import find_host


@feature("all tokens kept: bit for bit the bare model")
def keep_all(family: Family) -> None:
    inputs, model = family.make(BATCH, "left"), family.model
    logits, expected = model(**inputs).logits, model.generate(**inputs, **GREEDY, **DICTIONARY)
    with build_pruner("none")(model):
        assert model(**inputs).logits.equal(logits)
        actual = model.generate(**inputs, **GREEDY, **DICTIONARY)
    assert actual.sequences.equal(expected.sequences)
    assert torch.stack(actual.scores).equal(torch.stack(expected.scores))


@feature("batch of mixed sizes and prompts: as each row alone")
def mixed_batch(family: Family) -> None:
    inputs, model = family.make(BATCH, "left"), family.model
    with build_pruner("uniform", num_keep=7)(model):
        together, logits = answer(model, inputs), model(**inputs).logits
        for row in range(len(BATCH)):
            alone = family.single(inputs, row)
            assert answer(model, alone).equal(together[row : row + 1])
            expected = model(**alone).logits[0]
            assert_close(logits[row, -len(expected) :], expected, 1e-5)


@feature("left padding")
def left_padding(family: Family) -> None:
    inputs = family.make(BATCH, "left")
    short = by_hand(family, inputs)
    real = short.mask.bool()
    with pruner()(family.model):
        assert_close(family.model(**inputs).logits[real], short.logits()[real], 1e-5)
        assert answer(family.model, inputs).equal(short.greedy(NUM_NEW))


@feature("right padding")
def right_padding(family: Family) -> None:
    inputs = family.make(BATCH, "right")
    short = by_hand(family, inputs, side="right")
    real = short.mask.bool()
    expected = short.generate(**GREEDY)
    with pruner()(family.model):
        assert_close(family.model(**inputs).logits[real], short.logits()[real], 1e-5)
        assert answer(family.model, inputs).equal(expected)


@feature("several images a prompt")
def several_images(family: Family) -> None:
    check_greedy(family, family.model, SEVERAL)


@feature("text-only rows and calls")
def text_only(family: Family) -> None:
    inputs, model = family.make(BATCH, "left"), family.model
    row = next(i for i, parts in enumerate(BATCH) if len(parts) == 1)
    alone, text = answer(model, family.single(inputs, row)), family.make(TEXT, "left")
    expected = answer(model, text)
    with pruner()(model):
        assert answer(model, inputs)[row : row + 1].equal(alone)
        assert answer(model, text).equal(expected)


@feature("beams")
def beams(family: Family) -> None:
    check_like_the_host(family, num_beams=3, num_return_sequences=2, do_sample=False)


@feature("sampling")
def sampling(family: Family) -> None:
    check_like_the_host(family, num_return_sequences=3, do_sample=True, temperature=1.5)


@feature("assisted generation")
def assisted(family: Family) -> None:
    assistant = deepcopy(family.model)
    weights = assistant.lm_head.weight
    weights.mul_(torch.rand(weights.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    model = deepcopy(family.model)  # assisted decoding leaves settings on the model
    check_greedy(family, model, SEVERAL, assistant_model=assistant)


@feature("prompt lookup")
def prompt_lookup(family: Family) -> None:
    check_greedy(family, deepcopy(family.model), SEVERAL, prompt_lookup_num_tokens=3)


@feature("`use_cache=False`")
def no_cache(family: Family) -> None:
    check_greedy(family, family.model, use_cache=False)


@feature("static cache")
def static_cache(family: Family) -> None:
    model = deepcopy(family.model)  # transformers keeps that cache
    check_greedy(family, model, cache_implementation="static")


@feature("prefill in chunks")
def chunks(family: Family) -> None:
    check_greedy(family, family.model, prefill_chunk_size=7)


@feature("a later turn on a warm cache")
def later_turn(family: Family) -> None:
    inputs, model = family.make(BATCH, "left"), family.model
    short, length = by_hand(family, inputs), inputs["input_ids"].shape[1]
    bare = {k: v for k, v in inputs.items() if k not in find_host(model).image_keys}
    with pruner()(model):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        question = torch.randint(3, 99, (len(BATCH), 4), generator=torch.Generator().manual_seed(5))
        ids = torch.cat([first.sequences, question], dim=1)
        for turn in (bare, inputs):  # without the images, and with them again
            turn = turn | {"input_ids": ids}
            for name in turn.keys() & {"attention_mask", "mm_token_type_ids"}:
                more = turn[name].new_full((len(ids), ids.shape[1] - length), name[0] == "a")
                turn[name] = torch.cat([turn[name], more], dim=1)
            cache = deepcopy(first.past_key_values)
            said = answer(model, turn, **GREEDY, past_key_values=cache)
            assert said.equal(short.greedy(NUM_NEW, after=ids[:, length:]))


@feature("labels")
def labels(family: Family) -> None:
    inputs = family.make(BATCH, "left")
    short = by_hand(family, inputs)
    ids = inputs["input_ids"]
    kept = family.ids(short, inputs)
    wanted = kept.masked_fill(kept % IMAGE_TOKEN == 0, -100)  # neither images nor padding
    expected = family.model.loss_function(short.logits(), wanted, VOCABULARY)
    with pruner()(family.model):
        own = ids.masked_fill(ids % IMAGE_TOKEN == 0, -100)
        assert_close(family.model(**inputs, labels=own).loss, expected, 1e-5)
