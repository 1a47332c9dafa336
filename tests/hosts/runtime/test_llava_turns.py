"""Conversations: later turns on a warm cache that a pruned prompt filled."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import (
    BATCH,
    IMG,
    ONE,
    SEVERAL,
    Inputs,
    Short,
    best_by_cls,
    make_batch,
    shorten,
    single,
)
from tiny_models import IMAGE_TOKEN, PAD
from torch import Tensor
from transformers import DynamicCache, StaticCache

from ocvtp import Pruner, build_pruner

PROMPTS = {"one": ONE, "several": SEVERAL, "batch": BATCH}
prompts = pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.sampled(2)]


@pytest.fixture
def pruner() -> Pruner:
    return build_pruner("fastervlm", num_keep=5)


def by_hand(model: Any, inputs: Inputs) -> Short:
    return shorten(model, inputs, best_by_cls(model, inputs["pixel_values"], 5))


def continue_with(inputs: Inputs, answered: Tensor, num_new: int = 4, seed: int = 5) -> Inputs:
    """The next turn: all that was said, and a new question."""
    random = torch.Generator().manual_seed(seed)
    question = torch.randint(3, 99, (len(answered), num_new), generator=random)
    mask = inputs["attention_mask"]
    more = torch.ones(len(mask), answered.shape[1] + num_new - mask.shape[1], dtype=torch.long)
    return inputs | {
        "input_ids": torch.cat([answered, question], dim=1),
        "attention_mask": torch.cat([mask, more], dim=1),
    }


def without_images(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if name != "pixel_values"}


@pytest.mark.covering(2)
@prompts
@pytest.mark.parametrize("images_again", [False, True])
@pytest.mark.parametrize("own_cache", [None, DynamicCache, StaticCache])
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_later_turns_equal_recomputing_everything(
    llava: Any, pruner: Pruner, rows: Any, images_again: bool, own_cache: Any, positions: Any
) -> None:
    inputs = make_batch(rows)
    short, length = by_hand(llava, inputs), inputs["input_ids"].shape[1]
    length_of = {"max_cache_len": 120} if own_cache is StaticCache else {}
    cache = own_cache(config=llava.config.get_text_config(), **length_of) if own_cache else None
    with pruner(llava, positions=positions):
        if own_cache:
            said = llava.generate(**inputs, **GREEDY, past_key_values=cache)
        else:
            output = llava.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            said, cache = output.sequences, output.past_key_values
        for turn in range(2):
            inputs = continue_with(inputs, said, seed=turn)
            again = inputs if images_again else without_images(inputs)
            asked = inputs["input_ids"].shape[1]
            said = llava.generate(**again, **GREEDY, past_key_values=cache)
            assert torch.equal(said[:, :asked], inputs["input_ids"])
            after = inputs["input_ids"][:, length:]
            expected = short.greedy(5, positions, after=after)
            assert torch.equal(said[:, asked:], expected)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_answers_that_ended_early_are_padded(
    llava: Any, pruner: Pruner, positions: Any, with_mask: bool
) -> None:
    inputs = make_batch(BATCH)
    length = inputs["input_ids"].shape[1]
    with pruner(llava, positions=positions):
        output = llava.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        output.sequences[0, -3:] = PAD
        turn = without_images(continue_with(inputs, output.sequences))
        if with_mask:
            turn["attention_mask"] = (turn["input_ids"] != PAD).long()
        else:
            del turn["attention_mask"]
        said = llava.generate(**turn, **GREEDY, past_key_values=output.past_key_values)
    for row in range(3):
        alone = single(inputs, row)
        after = turn["input_ids"][row : row + 1, length:]
        after = after[:, after[0] != PAD]
        if "pixel_values" in alone:
            expected = by_hand(llava, alone).greedy(5, positions, after=after)
        else:
            text = torch.cat([alone["input_ids"], after], dim=1)
            expected = llava.generate(text, **GREEDY)[:, -5:]
        assert torch.equal(said[row : row + 1, -5:], expected)


def test_later_turns_keep_lengths_and_criteria(llava: Any, pruner: Pruner) -> None:
    seen = []
    stop = [lambda ids, scores, **_: seen.append(ids) or torch.zeros(len(ids)).bool()]
    with pruner(llava):
        output = llava.generate(**make_batch(BATCH), **GREEDY, return_dict_in_generate=True)
        turn = continue_with(make_batch(BATCH), output.sequences)
        cache, length = output.past_key_values, turn["input_ids"].shape[1]
        settings = {"max_length": length + 2, "do_sample": False, "stopping_criteria": stop}
        said = llava.generate(**turn, **settings, past_key_values=cache)
    assert said.shape[1] == length + 2
    assert all(torch.equal(ids[:, :length], turn["input_ids"]) for ids in seen)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_a_prefilled_cache_can_be_continued(llava: Any, pruner: Pruner, positions: Any) -> None:
    inputs = make_batch(SEVERAL)
    short, length = by_hand(llava, inputs), inputs["input_ids"].shape[1]
    turn = without_images(continue_with(inputs, inputs["input_ids"]))
    cache = DynamicCache(config=llava.config.get_text_config())
    with pruner(llava, positions=positions):
        with torch.no_grad():
            llava(**inputs, past_key_values=cache)
        for _ in range(2):
            said = llava.generate(**turn, **GREEDY, past_key_values=deepcopy(cache))
            after = turn["input_ids"][:, length:]
            expected = short.greedy(5, positions, after=after)
            assert torch.equal(said[:, -5:], expected)


@torch.no_grad()
def test_bare_steps_of_original_positions_need_them(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(ONE)
    short, length = by_hand(llava, inputs), inputs["input_ids"].shape[1]
    with pruner(llava, positions="original"):
        output = llava(**inputs)
        step = {"input_ids": torch.tensor([[9]]), "past_key_values": output.past_key_values}
        with pytest.raises(ValueError, match=rf"pass position_ids \(the next is \[{length}\]"):
            llava(**step)
        with pytest.raises(ValueError, match="pass position_ids"):
            llava(input_ids=torch.tensor([[9, 8]]), past_key_values=output.past_key_values)
        logits = llava(**step, position_ids=torch.tensor([[length]])).logits
    expected = short.logits(short.positions("original"), step["input_ids"])
    torch.testing.assert_close(logits[:, -1], expected[:, -1])


@pytest.fixture
def conversation(llava: Any, pruner: Pruner) -> Any:
    """The next turn of a conversation, and its cache."""
    inputs = make_batch(ONE)
    with pruner(llava):
        output = llava.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    return continue_with(inputs, output.sequences), output.past_key_values


def refuses(model: Any, pruner: Pruner, message: str, **arguments: Any) -> None:
    with pruner(model), pytest.raises(ValueError, match=message):
        model.generate(**arguments, **GREEDY)


def test_new_images_are_refused(llava: Any, pruner: Pruner, conversation: Any) -> None:
    turn, cache = conversation
    other = turn | {"pixel_values": turn["pixel_values"] + 1}
    refuses(llava, pruner, "brings new images", **other, past_key_values=cache)
    second = make_batch([(2, IMG, 1)])["input_ids"]
    more = continue_with(turn, torch.cat([turn["input_ids"], second], dim=1))
    more["pixel_values"] = turn["pixel_values"].repeat(2, 1, 1, 1)
    refuses(llava, pruner, "brings new images", **more, past_key_values=cache)
    del more["pixel_values"]
    refuses(llava, pruner, "brings new images", **more, past_key_values=cache)


def test_other_prompts_are_refused(llava: Any, pruner: Pruner, conversation: Any) -> None:
    turn, cache = conversation
    message = "do not begin with the prompt"
    other = continue_with(turn, make_batch(ONE, seed=1)["input_ids"], num_new=9)
    refuses(llava, pruner, message, **other, past_key_values=cache)
    only_new = {"input_ids": turn["input_ids"][:, -4:], "attention_mask": turn["attention_mask"]}
    refuses(llava, pruner, message, **only_new, past_key_values=cache)
    short_mask = without_images(turn) | {"attention_mask": make_batch(ONE)["attention_mask"]}
    refuses(llava, pruner, "pass equal shapes", **short_mask, past_key_values=cache)
    twice = {name: value.repeat(2, 1) for name, value in without_images(turn).items()}
    refuses(llava, pruner, message, **twice, past_key_values=cache)
    embeddings = llava.get_input_embeddings()(turn["input_ids"])
    message = "pass the whole conversation as input_ids"
    refuses(llava, pruner, message, inputs_embeds=embeddings, past_key_values=cache)


def test_foreign_and_cropped_caches_are_refused(
    llava: Any, pruner: Pruner, conversation: Any
) -> None:
    turn, cache = conversation
    foreign = DynamicCache(config=llava.config.get_text_config())
    llava.generate(**make_batch([(4,)]), **GREEDY, past_key_values=foreign)
    refuses(llava, pruner, "filled without the pruner", **turn, past_key_values=foreign)
    first = {name: value[:, :-9] for name, value in without_images(turn).items()}
    refuses(llava, pruner, "hold nothing that is not in the cache", **first, past_key_values=cache)
    cache.crop(10 - cache.get_seq_length())
    refuses(llava, pruner, "cropped into the prompt", **turn, past_key_values=cache)


@torch.no_grad()
def test_a_mask_of_the_callers_length_is_refused(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(BATCH)
    with pruner(llava):
        cache = llava(**inputs).past_key_values
        for width in (1, 2):
            ids = torch.full((3, width), 9)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
            with pytest.raises(ValueError, match="extend the short prompt's mask"):
                llava(input_ids=ids, attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_images_with_a_warm_cache_in_a_bare_forward_are_refused(
    llava: Any, pruner: Pruner, conversation: Any
) -> None:
    turn, cache = conversation
    with pruner(llava), pytest.raises(ValueError, match="images and a filled cache"):
        llava(**turn, past_key_values=cache)


def test_an_emptied_cache_forgets_its_prompt(llava: Any, pruner: Pruner, conversation: Any) -> None:
    _, cache = conversation
    inputs = make_batch([(6,)])
    with pruner(llava):
        cache.crop(-cache.get_seq_length())
        said = llava.generate(**inputs, **GREEDY, past_key_values=cache)
        turn = continue_with(inputs, said)
        expected = llava.generate(**turn, **GREEDY)
        assert torch.equal(llava.generate(**turn, **GREEDY, past_key_values=cache), expected)


def test_conversations_without_images_pass_untouched(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch([(6,), (9,)])

    def talk() -> Tensor:
        output = llava.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        turn = continue_with(inputs, output.sequences)
        return llava.generate(**turn, **GREEDY, past_key_values=output.past_key_values)

    expected = talk()
    with pruner(llava):
        assert torch.equal(talk(), expected)
