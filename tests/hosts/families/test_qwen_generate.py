"""generate() of pruned Qwen-VL models, against prompts pruned by hand; modes: test_matrix.py."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import reference
import torch
from qwen_reference import Short, look_at_all, shorten
from reference import Scripted, fingerprint
from tiny_models import IMAGE_TOKEN, PAD
from tiny_qwen import BATCH, ONE, SEVERAL, make_batch, single
from torch import Tensor
from transformers import DynamicCache, StaticCache

from ocvtp import Selection, VisualTokens, build_pruner

NUM_NEW = 6
PROMPTS = {"one": ONE, "several": SEVERAL, "batch": BATCH}
prompts = pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
GREEDY = {"do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
pytestmark = [pytest.mark.usefixtures("untouched_qwen"), pytest.mark.sampled(2)]


def some(tokens: VisualTokens) -> Selection:
    """A different number of tokens of every image."""
    keep = 2 * torch.arange(1, 6).repeat(tokens.batch_size, 1)
    counts = torch.arange(tokens.batch_size) % 3 + 3
    return Selection(keep, torch.arange(5) < counts[:, None])


def by_hand(model: Any, inputs: Any) -> Short:
    images = look_at_all(model, inputs)
    places = [[2 * place for place in range(1, 1 + i % 3 + 3)] for i in range(len(images))]
    return shorten(model, inputs, places, looked=images)


def answer_of(model: Any, inputs: Any, **settings: Any) -> Tensor:
    """The first tokens of the answer."""
    return reference.answer_of(model, inputs, max_new_tokens=NUM_NEW, **settings)


@prompts
def test_greedy_equals_a_hand_written_loop(qwen: Any, rows: Any) -> None:
    inputs = make_batch(rows)
    expected = by_hand(qwen, inputs).greedy(NUM_NEW)
    with Scripted(choose=some)(qwen):
        assert answer_of(qwen, inputs, **GREEDY).equal(expected)


@prompts
def test_keeping_all_is_bit_exact(qwen: Any, rows: Any) -> None:
    inputs, model = make_batch(rows), deepcopy(qwen)
    settings = GREEDY | {"return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(**inputs, max_new_tokens=NUM_NEW, **settings)
    deltas, model.model.rope_deltas = model.model.rope_deltas, None
    with build_pruner("none")(model):
        actual = model.generate(**inputs, max_new_tokens=NUM_NEW, **settings)
    assert actual.sequences.equal(expected.sequences)
    for ours, theirs in zip(actual.scores, expected.scores, strict=True):
        assert ours.equal(theirs)
    assert model.model.rope_deltas.equal(deltas)


def test_a_batch_equals_single_calls(qwen: Any) -> None:
    inputs = make_batch(BATCH)
    with build_pruner("divprune", num_keep=5)(qwen):
        together = answer_of(qwen, inputs, **GREEDY)
        for row in range(3):
            assert answer_of(qwen, single(inputs, row), **GREEDY).equal(together[row : row + 1])


def test_padding_may_be_left_to_be_found(qwen: Any) -> None:
    inputs = make_batch(BATCH)
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with Scripted(choose=some)(qwen):
        assert answer_of(qwen, bare, **GREEDY).equal(answer_of(qwen, inputs, **GREEDY))


def test_lengths_and_criteria_count_the_callers_prompt(qwen: Any) -> None:
    inputs, seen = make_batch(ONE), []
    stop = [lambda ids, scores, **_: seen.append(ids) or torch.zeros(len(ids)).bool()]
    length = inputs["input_ids"].shape[1]
    with Scripted(choose=some)(qwen):
        said = qwen.generate(**inputs, max_length=length + 4, stopping_criteria=stop)
    assert said.shape[1] == length + 4
    assert all(ids[:, :length].equal(inputs["input_ids"]) for ids in seen)


@pytest.mark.slow
def test_the_model_is_as_before(qwen: Any) -> None:
    inputs = make_batch(BATCH)
    with torch.no_grad():
        before, logits = fingerprint(qwen), qwen(**inputs).logits
        answer = answer_of(qwen, inputs, **GREEDY)
        with Scripted(choose=some)(qwen):
            answer_of(qwen, make_batch(ONE), **GREEDY)
            qwen(**make_batch(SEVERAL))
        after = fingerprint(qwen)
        assert qwen(**inputs).logits.equal(logits)
        text = make_batch([(7,), (4,)])
        assert answer_of(qwen, text, **GREEDY).equal(answer_of(deepcopy(qwen), text, **GREEDY))
        assert answer_of(qwen, inputs, **GREEDY).equal(answer)
    assert {key for key, _ in before.items() ^ after.items()} <= {"model.rope_deltas."}


def continue_with(inputs: Any, answered: Tensor, seed: int = 5) -> Any:
    """The next turn: all that was said, and a new question."""
    random = torch.Generator().manual_seed(seed)
    question = torch.randint(3, 99, (len(answered), 4), generator=random)
    ids = torch.cat([answered, question], dim=1)
    more = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    return inputs | {
        "input_ids": ids,
        "attention_mask": torch.cat([inputs["attention_mask"], more], dim=1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], 0 * more.int()], dim=1),
    }


def without_images(inputs: Any) -> Any:
    return {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")}


@pytest.mark.covering(2)
@pytest.mark.slow
@prompts
@pytest.mark.parametrize("images_again", [False, True])
@pytest.mark.parametrize("own_cache", [None, DynamicCache, StaticCache])
def test_later_turns_equal_recomputing_everything(
    qwen: Any, rows: Any, images_again: bool, own_cache: Any
) -> None:
    inputs = make_batch(rows)
    short, length = by_hand(qwen, inputs), inputs["input_ids"].shape[1]
    size = {"max_cache_len": 120} if own_cache is StaticCache else {}
    cache = own_cache(config=qwen.config.get_text_config(), **size) if own_cache else None
    settings = GREEDY | {"max_new_tokens": NUM_NEW, "return_dict_in_generate": True}
    with Scripted(choose=some)(qwen):
        output = qwen.generate(**inputs, **settings, past_key_values=cache)
        said, cache = output.sequences, output.past_key_values
        for turn in range(2):
            qwen.generate(**make_batch([(3,)]), max_new_tokens=1)  # another's deltas come between
            inputs = continue_with(inputs, said, seed=turn)
            again = inputs if images_again else without_images(inputs)
            asked = inputs["input_ids"].shape[1]
            said = qwen.generate(**again, **settings, past_key_values=cache).sequences
            assert said[:, :asked].equal(inputs["input_ids"])
            expected = short.greedy(NUM_NEW, after=inputs["input_ids"][:, length:])
            assert said[:, asked:].equal(expected)


def test_later_turns_of_all_tokens_are_those_of_the_bare_model(qwen: Any) -> None:
    inputs = make_batch(BATCH)

    def talk() -> Tensor:
        settings = GREEDY | {"max_new_tokens": NUM_NEW, "return_dict_in_generate": True}
        output = qwen.generate(**inputs, **settings)
        turn = continue_with(inputs, output.sequences)
        cache = output.past_key_values
        return qwen.generate(**without_images(turn), **settings, past_key_values=cache).sequences

    expected = talk()
    with build_pruner("none")(qwen):
        assert talk().equal(expected)


def test_conversations_go_on_in_a_loop(qwen: Any) -> None:
    """A generate(), and bare steps on its cache."""
    inputs = make_batch(ONE)
    short = by_hand(qwen, inputs)
    settings = GREEDY | {"max_new_tokens": 2, "return_dict_in_generate": True}
    for steps_inside in (0, 3):
        with Scripted(choose=some)(qwen), torch.no_grad():
            output = qwen.generate(**inputs, **settings)
            answer = [output.sequences[:, -1:]]
            for _ in range(steps_inside):
                logits = qwen(answer[-1], past_key_values=output.past_key_values).logits
                answer.append(logits[:, -1:].argmax(dim=-1))
        with torch.no_grad():
            for _ in range(3 - steps_inside):
                logits = qwen(answer[-1], past_key_values=output.past_key_values).logits
                answer.append(logits[:, -1:].argmax(dim=-1))
        assert torch.cat(answer, dim=1).equal(short.greedy(5)[:, 1:])


def test_new_images_in_a_later_turn_are_refused(qwen: Any) -> None:
    inputs = make_batch(ONE)
    settings = GREEDY | {"max_new_tokens": NUM_NEW, "return_dict_in_generate": True}
    with Scripted(choose=some)(qwen):
        output = qwen.generate(**inputs, **settings)
        turn = continue_with(inputs, output.sequences)
        other = turn | {"pixel_values": turn["pixel_values"] + 1}
        with pytest.raises(ValueError, match="brings new images"):
            qwen.generate(**other, **settings, past_key_values=output.past_key_values)


def test_a_compiled_tower_is_looked_into(qwen: Any) -> None:
    inputs, model = make_batch(BATCH), deepcopy(qwen)
    with build_pruner("fopru", num_keep=5)(qwen):
        expected = answer_of(qwen, inputs, **GREEDY)
    torch.compiler.reset()
    model.model.visual.compile(backend="eager")
    with build_pruner("fopru", num_keep=5)(model):
        assert answer_of(model, inputs, **GREEDY).equal(expected)


def test_answers_that_ended_early_are_padded(qwen: Any) -> None:
    inputs = make_batch(BATCH)
    length = inputs["input_ids"].shape[1]
    settings = GREEDY | {"max_new_tokens": NUM_NEW, "return_dict_in_generate": True}
    with Scripted(choose=some)(qwen):
        output = qwen.generate(**inputs, **settings)
        output.sequences[0, -3:] = PAD
        turn = without_images(continue_with(inputs, output.sequences))
        turn["attention_mask"] = (turn["input_ids"] != PAD).long()
        said = qwen.generate(**turn, **settings, past_key_values=output.past_key_values).sequences
    alone = single(inputs, 0)
    after = turn["input_ids"][:1, length:]
    expected = by_hand(qwen, alone).greedy(NUM_NEW, after=after[:, after[0] != PAD])
    assert said[:1, -NUM_NEW:].equal(expected)
