"""One attached model serves different budgets, call by call and row by row."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from matrix.families import EVERY_FAMILY, Family, untouched
from reference import GREEDY, IMG, assert_close, make_batch

from ocvtp import Chain, Compose, attach, build_pruner
from ocvtp.hosts import find_host

ROWS = [(5, IMG, 4), (3, IMG, 2, IMG, 1)]
ROW_OF = [0, 1, 1]
"""The row of each image."""
METHODS: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "divprune": ("num_keep", [5, 3, 10_000], {}),
    "random": ("num_keep", [5, 3, 2], {}),
    "visionzip": ("num_keep", [5, 10_000, 3], {"guidance": "received", "block": -1}),
    "trimtokenator": ("keep_ratio", [0.5, 0.2, 0.4], {}),
    "fastv": ("keep_ratio", [0.9, 0.75, 1.0], {"layer": 2}),
    "vflowopt": ("keep_ratio", [0.5, 0.4, 0.3], {"cell": 1, "block": -1}),
}
"""What says the budget, that of the pruner and those of both rows, and other settings."""


@pytest.fixture(params=EVERY_FAMILY)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with untouched(request.param) as family:
        yield family


@torch.no_grad()
def run(model: Any, inputs: Any, seen: list[Any], **budget: Any) -> tuple[Any, dict[str, Any]]:
    """Last logits, and what was kept."""
    logits = model(**inputs, **budget).logits[:, -1]
    return logits, seen[-1].summary()


def kept_in(facts: dict[str, Any], row: int) -> list[list[int]]:
    """Of each image of a row, before the language model and at every stage inside it."""
    stages = [facts["visual_tokens_kept"]]
    stages += [stage["visual_tokens_kept"] for stage in facts["layers"]]
    return [[kept[image] for image, own in enumerate(ROW_OF) if own == row] for kept in stages]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", METHODS)
def test_rows_are_pruned_as_with_a_pruner_of_their_own(family: Family, name: str) -> None:
    if family.host == "qwen3_vl" and name == "vflowopt":
        pytest.skip("its first layers add rows of the tower to all tokens")
    make = family.make_unresized or family.make
    inputs, model, seen = make(ROWS, "left"), family.model, list[Any]()
    key, (own, *of_rows), settings = METHODS[name]
    expected = []
    for value in of_rows:
        with build_pruner(name, **{key: value}, **settings)(model, on_prune=seen.append):
            expected.append(run(model, inputs, seen))
    pruner = build_pruner(name, **{key: own}, **settings)
    with pruner(model, on_prune=seen.append):
        before = run(model, inputs, seen)
        logits, facts = run(model, inputs, seen, **{key: of_rows})
        for row, value in enumerate(of_rows):
            alone, own_facts = expected[row]
            assert kept_in(facts, row) == kept_in(own_facts, row)
            assert_close(logits[row], alone[row], 1e-5)
            assert torch.equal(run(model, inputs, seen, **{key: value})[0], alone)
        partly = run(model, inputs, seen, **{key: (None, of_rows[1])})
        assert kept_in(partly[1], 0) == kept_in(before[1], 0)
        assert kept_in(partly[1], 1) == kept_in(expected[1][1], 1)
        after = run(model, inputs, seen)
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


# --------------------------------------------------------------------------------------- generate


BATCH = [(5, IMG, 4), (3, IMG, 2, IMG, 6)]


BEAMS = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("name", "settings"), [("fastervlm", {}), ("fastervlm", BEAMS), ("fastv", BEAMS)]
)
def test_generate_takes_a_budget_for_each_row(llava: Any, name: str, settings: Any) -> None:
    inputs, own = make_batch(BATCH), {"fastervlm": (3, 9), "fastv": (13, 15)}[name]
    more = {"layer": 2} if name == "fastv" else {}
    settings = GREEDY | settings | {"return_dict_in_generate": True}
    alone = []
    for num_keep in own:
        with build_pruner(name, num_keep=num_keep, **more)(llava):
            alone.append(llava.generate(**inputs, **settings).sequences)
    with build_pruner(name, num_keep=14, **more)(llava):
        before = llava.generate(**inputs, **settings).sequences
        for given in (np.array(own), torch.tensor(own)):
            found = llava.generate(**inputs, **settings, num_keep=given).sequences
            for row, expected in enumerate(chunks(alone, len(found) // 2)):
                assert torch.equal(chunks([found], len(found) // 2)[0][row], expected[row])
        for num_keep, expected in zip(own, alone, strict=True):
            found = llava.generate(**inputs, **settings, num_keep=np.int64(num_keep)).sequences
            assert torch.equal(found, expected)
        assert torch.equal(llava.generate(**inputs, **settings).sequences, before)
        text = make_batch([(9,), (4,)])
        del text["attention_mask"]
        assert llava.generate(**text, **GREEDY, num_keep=[3, 4]).shape == (2, 15)
    with pytest.raises(ValueError, match="num_keep"):  # transformers' own, as before
        llava.generate(**inputs, **GREEDY, num_keep=3)
    assert "num_keep" not in vars(llava.generation_config)


def chunks(made: list[Any], size: int) -> list[Any]:
    """The sequences of each row of the prompt."""
    return [values.split(size) for values in made]


WRONG = [
    ({"num_keep": [3]}, r"num_keep=\[3\] has 1 value for 2 prompts; pass one number for all, or"),
    ({"num_keep": [3, 4, 5, 6]}, "has 4 values for 2 prompts; .* beams and returned sequences"),
    ({"num_keep": []}, "has 0 values for 2 prompts"),
    ({"num_keep": 0}, "num_keep=0; pass at least 1 token"),
    ({"num_keep": [3, -1]}, "num_keep=-1; pass at least 1 token"),
    ({"num_keep": 0.5}, "num_keep=0.5; pass a whole number of tokens.* keep_ratio is for shares"),
    ({"num_keep": True}, "num_keep=True; pass a whole number"),
    ({"num_keep": "3"}, "num_keep='3'; pass a whole number"),
    ({"num_keep": [[3], [4]]}, r"num_keep=\[3\]; pass a whole number"),
    ({"keep_ratio": [0.5, 2.0]}, "keep_ratio=2.0; pass the share of tokens KEPT"),
    ({"num_keep": 3, "keep_ratio": 0.5}, "num_keep=3 and keep_ratio=0.5; pass exactly one"),
    ({"num_keep": [3, None], "keep_ratio": 0.5}, "num_keep=3 and keep_ratio=0.5; pass exactly one"),
    ({"num_keep": [3, 4], "max_keep": 9}, "num_keep=3 and max_keep=9; pass one of them"),
    ({"keep_ratio": [0.5, 1], "max_keep": [9]}, "lists of different lengths"),
]


def test_wrong_budgets_get_one_clear_error(llava: Any) -> None:
    inputs, pruner = make_batch(BATCH), build_pruner("fastervlm", num_keep=14)
    with pruner(llava):
        for budget, message in WRONG:
            for call in (llava.generate, llava):
                with pytest.raises(ValueError, match=message):
                    call(**inputs, **budget)
                for prompts in ((9,), (4,)), ((0,), (0,)):  # text alone, and a token of each row
                    with pytest.raises(ValueError, match=message):
                        call(**make_batch(prompts), **budget)
            with pytest.raises(ValueError, match=message):
                llava.model(**make_batch([(9,), (4,)]), **budget)
        expected = llava.generate(**inputs, **GREEDY)
        assert torch.equal(llava.generate(**inputs, **GREEDY, num_keep=None), expected)
        text = make_batch([(0,), (0,)])
        for model in (llava, llava.model):
            assert torch.equal(model(**text, num_keep=[3, 4])[0], model(**text)[0])


FIXED: list[tuple[Any, str]] = [
    (build_pruner("fastv", stages=((1, 3),)), r"'fastv' was built with stages=\(\(1, 3\),\), so"),
    (build_pruner("sparsevlm", stages=((1, 3),)), "'sparsevlm' was built with stages="),
    (build_pruner("none"), "'none' keeps every token, so that num_keep=3 cannot be said later"),
    (build_pruner("tome", num_keep=8), "'tome' acts before or inside the vision tower.* attach it"),
    (build_pruner("tome", r=2), "'tome' acts before or inside the vision tower"),
    (
        Compose([build_pruner("fastervlm", num_keep=8), build_pruner("fastv", num_keep=6)]),
        r"'fastervlm\+fastv' is composed of 2 pruners with a budget each, so that num_keep=3 can",
    ),
    (
        Chain([build_pruner("uniform", num_keep=2), build_pruner("divprune", num_keep=2)]),
        "Chain got 'divprune' with num_keep=3 after 'uniform', which leaves 2",
    ),
]


@pytest.mark.parametrize(("pruner", "message"), FIXED)
def test_what_cannot_have_another_budget_says_so(llava: Any, pruner: Any, message: str) -> None:
    inputs = make_batch(BATCH)
    with pruner(llava):
        expected = llava.generate(**inputs, **GREEDY)
        for given in (3, [3, 3]):
            with pytest.raises(ValueError, match=message):
                llava.generate(**inputs, **GREEDY, num_keep=given)
            for rows in ([(9,), (4,)], [(0,), (0,)]):
                with pytest.raises(ValueError, match=message):
                    llava(**make_batch(rows), num_keep=given)
        with pytest.raises(ValueError, match=message), pruner(llava, num_keep=3):
            pass
        assert torch.equal(llava.generate(**inputs, **GREEDY), expected)


def test_a_chain_and_a_single_composed_pruner_take_one(llava: Any) -> None:
    inputs, seen = make_batch(BATCH), list[Any]()
    chain = Chain([build_pruner("uniform", num_keep=9), build_pruner("divprune", num_keep=7)])
    for pruner in (chain, Compose([build_pruner("divprune", num_keep=7)])):
        with pruner(llava, on_prune=seen.append):
            assert run(llava, inputs, seen)[1]["visual_tokens_kept"] == [7, 7, 7]
            kept = run(llava, inputs, seen, num_keep=[4, 2])[1]["visual_tokens_kept"]
            assert kept == [4, 2, 2]


@pytest.mark.parametrize(
    "pruner", [build_pruner("prumerge"), build_pruner("fastervlm", quality=0.4)]
)
def test_a_pruner_that_counts_for_itself_keeps_at_most_so_many(llava: Any, pruner: Any) -> None:
    inputs, seen = make_batch(BATCH), list[Any]()
    with pruner(llava, on_prune=seen.append):
        own = run(llava, inputs, seen)[1]["visual_tokens_kept"]
        kept = run(llava, inputs, seen, num_keep=[2, None])[1]["visual_tokens_kept"]
        assert kept == [min(own[0], 2), *own[1:]]
        assert len(llava.generate(**inputs, **GREEDY)) == 2


# ----------------------------------------------------------------------------------------- blocks


def test_a_block_has_a_budget_of_its_own(llava: Any) -> None:
    inputs, seen = make_batch(BATCH), list[Any]()
    pruner = build_pruner("fastervlm", num_keep=14)

    def kept(**budget: Any) -> int:
        return run(llava, inputs, seen, **budget)[1]["visual_tokens_kept"][0]

    with pruner(llava, num_keep=5, on_prune=seen.append):  # attached with it
        assert kept() == 5
        with pruner(llava, num_keep=4):
            assert kept() == 4
        assert kept() == 5
    assert pruner.num_keep == 14
    handle = attach(llava, pruner, on_prune=seen.append)
    with pruner(llava, keep_ratio=0.5) as inside:
        assert inside.savings == handle.savings
        assert kept() == 8
        assert kept(num_keep=3) == 3
        with pruner(llava, max_keep=2):
            assert kept() == 2
        with pruner(llava, num_keep=None):  # says nothing
            assert kept() == 8
        others: list[Any] = []
        thread = Thread(target=lambda: others.append(kept()))
        thread.start()
        thread.join()
        assert others == [14]
        llava.generate(**inputs, **GREEDY)
        assert seen[-1].summary()["visual_tokens_kept"][0] == 8
    with pytest.raises(RuntimeError, match="stop"), pruner(llava, num_keep=2):
        raise RuntimeError("stop")
    assert kept() == 14
    for other, options in ((pruner, {}), (build_pruner("uniform", num_keep=3), {"num_keep": 3})):
        message = "a pruner is attached to this model already"
        with pytest.raises(ValueError, match=message), other(llava, **options):
            pass
    with pytest.raises(ValueError, match="num_keep=0; pass at least"), pruner(llava, num_keep=0):
        pass
    handle.remove()
    assert torch.equal(llava(**inputs).logits, llava(**inputs).logits)
    assert find_host(llava).model is llava


def test_states_of_all_columns_and_the_inner_model(llava: Any) -> None:
    inputs, seen = make_batch(BATCH), list[Any]()
    with build_pruner("fastervlm", num_keep=14)(llava, logits="full", on_prune=seen.append):
        output = llava(**inputs, num_keep=[2, 3])
        assert output.logits.shape[1] == inputs["input_ids"].shape[1]
        assert seen[-1].summary()["visual_tokens_kept"] == [2, 3, 3]
        llava.model(**inputs, num_keep=[4, 5])
        assert seen[-1].summary()["visual_tokens_kept"] == [4, 5, 5]
        llava(**inputs)
        assert seen[-1].summary()["visual_tokens_kept"] == [14, 14, 14]


@pytest.mark.parametrize("name", ["fastervlm", "fastv"])
def test_later_turns_keep_what_the_first_one_kept(llava: Any, name: str) -> None:
    inputs = make_batch([(5, IMG, 4)])
    settings = GREEDY | {"return_dict_in_generate": True}
    pruner = build_pruner(name, num_keep=15, **({"layer": 2} if name == "fastv" else {}))
    with build_pruner(name, num_keep=13, **({"layer": 2} if name == "fastv" else {}))(llava):
        expected = turns(llava, inputs, settings)
    with pruner(llava):
        first = llava.generate(**inputs, **settings, num_keep=13)
        more = next_turn(first)
        message = "num_keep=13 comes with a cache whose images were"
        with pytest.raises(ValueError, match=message):
            llava.generate(**more, **settings, num_keep=13)
        filled = llava(**inputs, num_keep=13).past_key_values
        for model, length in product((llava, llava.model), (1, 3)):
            step = {"input_ids": torch.full((1, length), 7), "past_key_values": filled}
            with pytest.raises(ValueError, match=message):
                model(**step, num_keep=13)
        assert torch.equal(llava.generate(**more, **settings).sequences, expected)
        with pruner(llava, num_keep=13):  # all turns are inside of it
            assert torch.equal(turns(llava, inputs, settings), expected)
            step = llava(**inputs)
            llava(input_ids=torch.tensor([[7]]), past_key_values=step.past_key_values)
            assert torch.equal(turns(llava, inputs, settings), expected)


def test_turns_of_text_alone_may_say_a_budget(llava: Any) -> None:
    ids, settings = torch.tensor([[1, 5, 6, 7]]), GREEDY | {"return_dict_in_generate": True}
    with build_pruner("fastervlm", num_keep=14)(llava):
        expected = turns(llava, {"input_ids": ids}, settings)
        assert torch.equal(turns(llava, {"input_ids": ids}, settings | {"num_keep": 3}), expected)
        for model in (llava, llava.model):
            cache = model(input_ids=ids).past_key_values
            model(input_ids=ids[:, :1], past_key_values=cache, num_keep=3)
            with pytest.raises(ValueError, match="num_keep=0; pass at least"):
                model(input_ids=ids, past_key_values=cache, num_keep=0)


def turns(model: Any, inputs: Any, settings: Any) -> Any:
    first = model.generate(**inputs, **settings)
    return model.generate(**next_turn(first), **settings).sequences


def next_turn(output: Any) -> dict[str, Any]:
    answer = output.sequences[:, -GREEDY["max_new_tokens"] :].clamp(max=99)  # no placeholder
    ids = [output.sequences[:, : -answer.shape[1]], answer, torch.tensor([[8, 9, 10]])]
    ids = torch.cat(ids, dim=1)
    return {"input_ids": ids, "past_key_values": output.past_key_values}


def test_a_number_in_a_tensor_of_no_dimension_is_a_budget(llava: Any) -> None:
    inputs, seen = make_batch(BATCH), list[Any]()
    pruner = build_pruner("fastervlm", num_keep=torch.tensor(14))
    with pruner(llava, num_keep=torch.tensor(5), on_prune=seen.append):
        assert run(llava, inputs, seen)[1]["visual_tokens_kept"][0] == 5
        for given in (torch.tensor(3), np.array(3), [torch.tensor(3), np.uint8(3)]):
            assert run(llava, inputs, seen, num_keep=given)[1]["visual_tokens_kept"][0] == 3
        with pruner(llava, keep_ratio=torch.tensor(0.5)):
            assert run(llava, inputs, seen)[1]["visual_tokens_kept"][0] == 8
        for wrong in (torch.tensor([4]), torch.tensor(True), torch.tensor(4.0)):
            with pytest.raises(ValueError, match=r"num_keep=.*; pass a whole number of tokens"):
                with pruner(llava, num_keep=wrong):
                    pass


def test_a_setting_that_a_budget_has_no_room_for_names_the_pruner(llava: Any) -> None:
    inputs = make_batch(BATCH)
    with pytest.warns(UserWarning, match="exceeds the 16 visual tokens"):
        handle = attach(llava, build_pruner("visionzip", setting="paper-64"))
    message = (
        "pruner 'visionzip': num_contextual=10 of num_keep=8; pass 0 to 7, or None .* or keep 11"
        " tokens or more"
    )
    for call in (llava.generate, llava):
        with pytest.raises(ValueError, match=message):
            call(**inputs, num_keep=8)
    llava(**inputs, num_keep=11)
    handle.remove()
