"""Processors and criteria of generate()'s caller replace generate()'s own, as without a pruner."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import BATCH, ONE, make_batch
from tiny_models import PAD
from transformers import (
    EosTokenCriteria,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
)

from ocvtp import Pruner, build_pruner
from ocvtp.hosts.runtime.generate_arguments import Callers, Shown
from ocvtp.hosts.runtime.processor_lists import CriteriaOfCallers

LENGTH = make_batch(ONE)["input_ids"].shape[1]
ENDS = list(range(3, 128))
LONG = {"max_new_tokens": 12, "do_sample": False}
pytestmark = [
    pytest.mark.usefixtures("untouched"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# generate()'s own setting, the caller's object of the same class, and the setting that it means
SAME: dict[str, tuple[dict[str, Any], Callable[[], Any], dict[str, Any]]] = {
    "repetition": (
        {"repetition_penalty": 9.0},
        lambda: RepetitionPenaltyLogitsProcessor(1.01),
        {"repetition_penalty": 1.01},
    ),
    "n-grams": (
        {"no_repeat_ngram_size": 1},
        lambda: NoRepeatNGramLogitsProcessor(4),
        {"no_repeat_ngram_size": 4},
    ),
    "bias": (
        {"sequence_bias": [[[7], 90.0]]},
        lambda: SequenceBiasLogitsProcessor([[[8], 90.0]]),
        {"sequence_bias": [[[8], 90.0]]},
    ),
    "shortest": (
        {"min_length": LENGTH + 6, "eos_token_id": ENDS},
        lambda: MinLengthLogitsProcessor(LENGTH + 3, ENDS, device="cpu"),
        {"min_length": LENGTH + 3, "eos_token_id": ENDS},
    ),
    "fewest": (
        {"min_new_tokens": 3, "eos_token_id": ENDS},
        lambda: MinNewTokensLengthLogitsProcessor(LENGTH, 6, ENDS, device="cpu"),
        {"min_new_tokens": 6, "eos_token_id": ENDS},
    ),
    "longest": (
        {"max_new_tokens": 5},
        lambda: MaxLengthCriteria(LENGTH + 9),
        {"max_new_tokens": 9},
    ),
    "forced": (
        {"forced_eos_token_id": 7, "max_new_tokens": 9},
        lambda: ForcedEOSTokenLogitsProcessor(LENGTH + 5, 11, device="cpu"),
        {"sequence_bias": [[[11], 0.0]], "max_new_tokens": 9},
    ),
    "time": ({"max_time": 600.0}, lambda: MaxTimeCriteria(-1.0), {"max_time": -1.0}),
    "end": (
        {"eos_token_id": ENDS},
        lambda: EosTokenCriteria(torch.tensor([2])),
        {"eos_token_id": 2},
    ),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("name", ["none", "fastervlm", "fastv"])
def test_what_the_caller_hands_over_replaces_what_is_of_its_class(
    llava: Any, name: str, kind: str
) -> None:
    inputs, (own, make, meant) = make_batch(ONE), SAME[kind]
    handed = make()
    is_criterion = isinstance(handed, StoppingCriteria)
    given = {"stopping_criteria" if is_criterion else "logits_processor": [handed]}

    def said(**settings: Any) -> list[int]:
        sequences = llava.generate(**inputs, **LONG | {"pad_token_id": PAD} | settings)
        return sequences[0, LENGTH:].tolist()

    bare = said(**own, **given)
    with build_pruner(name, **({} if name == "none" else {"num_keep": 12}))(llava):
        pruned = said(**own, **given)
        expected = said(**meant)
        if kind == "forced":  # in the place that only the caller's long prompt leads to
            expected[4] = 11
            assert pruned[4] == bare[4] == 11
            assert pruned[8] != 7
            assert pruned[:5] == expected[:5]
        else:
            assert pruned == expected
            assert said(**own) != pruned
    if name == "none":
        assert pruned == bare


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=["beams", "some beams", "samples"],
)
@pytest.mark.parametrize("own", [False, True])
def test_constraints_are_asked_about_the_rows_that_they_are_without_a_pruner(
    llava: Any, pruner: Pruner, settings: Any, own: bool
) -> None:
    inputs, asked = make_batch(BATCH), list[tuple[int, list[int]]]()
    length = inputs["input_ids"].shape[1]

    def allowed(row: int, prefix: torch.Tensor) -> list[int]:
        asked.append((row, prefix[:length].tolist()))
        return [7 + len(prefix) - length]

    given: dict[str, Any] = {"prefix_allowed_tokens_fn": allowed}
    if own:
        repeats = settings.get("num_beams", settings.get("num_return_sequences"))
        given = {"logits_processor": [PrefixConstrainedLogitsProcessor(allowed, repeats)]}
    answers, rows = [], []
    for how in (None, build_pruner("none"), pruner):
        asked.clear()
        if how is None:
            said = llava.generate(**inputs, max_new_tokens=3, **settings, **given)
        else:
            with how(llava):
                said = llava.generate(**inputs, max_new_tokens=3, **settings, **given)
        answers.append(said.tolist())
        rows.append(list(asked))
    assert rows[0]
    assert rows[0] == rows[1] == rows[2]
    assert answers[0] == answers[1] == answers[2]


class Recorder(LogitsProcessor):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return scores


@pytest.mark.parametrize("who", ["another", "itself", "pruned too"])
def test_an_assistant_drafts_with_what_the_caller_handed_over(
    llava: Any, pruner: Pruner, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, recorder = make_batch(ONE), Recorder()
    penalties: list[tuple[float, int]] = []
    run = RepetitionPenaltyLogitsProcessor.__call__

    def counted(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        penalties.append((self.penalty, int((input_ids[0, :LENGTH] == 100).sum())))
        return run(self, input_ids, scores)

    monkeypatch.setattr(RepetitionPenaltyLogitsProcessor, "__call__", counted)
    settings = LONG | {"repetition_penalty": 9.0, "max_new_tokens": 4}
    given = {"logits_processor": [recorder, RepetitionPenaltyLogitsProcessor(1.01)]}
    assistant = llava if who == "itself" else deepcopy(llava)
    attributes = dict(vars(assistant))
    with pruner(llava):
        expected = llava.generate(**inputs, **settings, **given)
        num_alone = len(recorder.seen)
        penalties.clear()
        if who == "pruned too":
            with pruner(assistant):
                said = llava.generate(**inputs, **settings, **given, assistant_model=assistant)
        else:
            said = llava.generate(**inputs, **settings, **given, assistant_model=assistant)
    assert said.equal(expected)
    assert len(recorder.seen) > 2 * num_alone  # drafts, and looks at them
    assert all(seen[:, :LENGTH].equal(inputs["input_ids"]) for seen in recorder.seen)
    assert set(penalties) == {(1.01, 16)}
    assert vars(assistant).keys() == attributes.keys()


def test_prompt_lookup_reads_with_what_the_caller_handed_over(llava: Any, pruner: Pruner) -> None:
    inputs, recorder = make_batch(ONE), Recorder()
    settings = LONG | {"repetition_penalty": 9.0, "logits_processor": [recorder]}
    with pruner(llava):
        expected = llava.generate(**inputs, **settings)
        said = llava.generate(**inputs, **settings, prompt_lookup_num_tokens=3)
    assert said.equal(expected)
    assert all(seen[:, :LENGTH].equal(inputs["input_ids"]) for seen in recorder.seen)


def test_a_later_turn_reads_the_whole_conversation(llava: Any, pruner: Pruner) -> None:
    inputs, recorder = make_batch(ONE), Recorder()
    settings = LONG | {"return_dict_in_generate": True, "max_new_tokens": 2}
    with pruner(llava):
        first = llava.generate(**inputs, **settings)
        ids = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], dim=1)
        cache = first.cache if "cache" in first else first["past_" + "key_values"]
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        llava.generate(**turn, **settings, logits_processor=[recorder])
    assert recorder.seen[0].equal(ids)


def test_criteria_report_the_length_of_what_generate_reads() -> None:
    own, given = MaxLengthCriteria(20), MaxLengthCriteria(30)
    shown = Shown(torch.zeros(1, 16, dtype=torch.long), 5)
    for item, length in ((own, 20), (given, 30 - 11)):
        criteria = CriteriaOfCallers(
            [EosTokenCriteria(2), item], shown, Callers([given], shown).has
        )
        assert criteria.max_length == length
        for num_new, stops in ((length - 6, False), (length - 5, True)):
            assert criteria(torch.ones(1, 5 + num_new, dtype=torch.long), None).tolist() == [stops]
    assert CriteriaOfCallers([], shown, Callers([given], shown).has).max_length is None


def test_processors_that_generate_does_not_merge_are_refused(
    llava: Any, pruner: Pruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_batch(ONE)
    monkeypatch.setattr(
        type(llava), "_get_logits_processor", lambda self, **kwargs: kwargs["logits_processor"]
    )
    given = {"logits_processor": LogitsProcessorList([Recorder()])}
    given["stopping_criteria"] = [MaxLengthCriteria(LENGTH + 2)]
    with pruner(llava):
        with pytest.raises(ValueError, match="did not put Recorder among its own.*leave them out"):
            llava.generate(**inputs, **LONG, **given)
        llava.generate(**inputs, **LONG)
