"""Pruners as they are written on a command line."""

from __future__ import annotations

import pytest
from small_networks import network_setting

from ocvtp.bench.variants import variants
from ocvtp.evaluation.conditions import Budget, pruner_conditions
from ocvtp.pruners.specs import (
    build_spec,
    build_specs,
    has_budget,
    names_budget,
    parse_spec,
    refuse_unread,
    with_budget,
)


def test_a_k_in_the_settings_is_the_budget():
    pruner = build_spec("fastv:stages=[[2,K]]", num_keep=64)
    assert [tuple(stage) for stage in pruner.stages] == [(2, 64)]
    assert pruner.num_keep is None
    assert with_budget("fastv:stages=[[2,K],[3,K]]", 7) == "fastv:stages=[[2,7],[3,7]]"


@pytest.mark.parametrize("spec", ["fastv", "fopru:strategy=row", "K", "fastv:stages=[[2,KK]]"])
def test_other_specs_have_none(spec):
    assert not names_budget(spec)
    assert with_budget(spec, 5) == spec


def test_a_k_without_a_budget_is_refused():
    with pytest.raises(ValueError, match="has a K, which stands for num_keep"):
        build_spec("fastv:stages=[[2,K]]", num_keep=None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        ("1.e3", 1000.0),
        (".5e1", 5.0),
        ("[1e-4,[2e0,3]]", [1e-4, [2.0, 3]]),
        ("{mmr: 5e-1}", {"mmr": 0.5}),
        ("'1e-4'", "1e-4"),
        ("1e", "1e"),
        ("e4", "e4"),
        ("12", 12),
    ],
)
def test_a_number_with_an_exponent_is_a_number(text, value):
    settings = parse_spec(f"ridge:penalty={text}")[1]
    assert settings == {"penalty": value}
    assert type(settings["penalty"]) is type(value)


def test_a_pruner_takes_a_number_with_an_exponent():
    assert build_spec("ridge:penalty=1e-4", num_keep=4).penalty == 1e-4


@pytest.mark.parametrize("spec", ["fopru:strategy=nope", "kmeans:iterations=-1"])
def test_what_a_pruner_refuses_says_which_it_is(spec):
    with pytest.raises(ValueError, match=f"^pruner '{spec}': .*pass "):
        build_spec(spec, num_keep=4)
    with pytest.raises(ValueError, match="^pruner 'fopru' got block='x'"):  # said already
        build_spec("fopru:block=x", num_keep=4)


@pytest.mark.parametrize(
    "spec",
    [
        "divprune:max_keep=9",
        "divprune:num_keep=9",
        "divprune:keep_ratio=0.5,max_keep=9",
        "fastv:stages=[[2,9]]",
        "visionzip:setting=paper-64",
    ],
)
def test_a_spec_may_have_a_budget_of_its_own(spec):
    """What a command says for all pruners does not count then, nor is it in its row."""
    assert has_budget(spec)
    alone = build_spec(spec)
    for shared in ({"num_keep": 4}, {"keep_ratio": 0.25}, {"max_keep": 4}):
        pruner = build_spec(spec, **shared)
        for name in ("num_keep", "keep_ratio", "max_keep"):
            assert getattr(pruner, name) == getattr(alone, name)
    (one,) = pruner_conditions(spec, [Budget(64), Budget(32)], [0], [], 576)
    assert one.budget is None
    assert [variant.num_keep for variant in variants([spec], [64, 32], 576)] == [None, None]
    assert not has_budget(spec.partition(":")[0])


def test_a_budget_that_counts_for_no_pruner_is_refused():
    """That of all is of those that say none."""
    both = build_specs(["divprune:num_keep=9", "fopru"], num_keep=4)
    assert [pruner.num_keep for pruner in both] == [9, 4]
    (of_k,) = build_specs(["fastv:stages=[[2,K]]"], num_keep=4)
    assert of_k.stages == [[2, 4]]
    with pytest.raises(
        ValueError, match="keep_ratio=0.5 would not count: divprune:num_keep=9 says"
    ):
        build_specs(["divprune:num_keep=9"], num_keep=None, keep_ratio=0.5)


@pytest.mark.parametrize("budget", [{"num_keep": 4}, {"keep_ratio": 0.5}, {"max_keep": 4}])
def test_what_keeps_all_tokens_takes_a_budget_as_the_others_do(budget):
    """So that a command is the same for the yardstick and for what is measured by it."""
    (whole,) = build_specs(["none"], **budget)
    assert whole.name == "none"


def test_stages_inside_leave_a_method_of_two_halves_its_budget_before():
    for budgets in ([Budget(16)], [Budget(16), Budget(9)]):
        made = pruner_conditions("vflowopt:stages=[[1,9]]", budgets, [0], [], 576)
        assert [one.budget for one in made] == budgets
    (once,) = pruner_conditions("fastv:stages=[[1,9]]", [Budget(16), Budget(9)], [0], [], 576)
    assert once.budget is None


def test_a_checkpoint_that_no_pruner_reads_is_refused():
    for specs, why in ((["none"], "none takes no checkpoint"), ([], "no pruner is named")):
        with pytest.raises(ValueError, match=f"^checkpoint='here' would not count: {why}; "):
            refuse_unread(specs, checkpoint="here")
    refuse_unread(["divprune", "ocvtp"], checkpoint="here")
    with pytest.raises(ValueError, match="ocvtp:checkpoint=a says its own; leave it out"):
        refuse_unread(["divprune", "ocvtp:checkpoint=a"], checkpoint="here")


def test_a_budget_of_a_network_that_is_not_trained_yet():
    network = network_setting("learned", 8)["network"]
    specs = [variants([s], [8, 4], 16, network=network) for s in ("learned", "learned:max_keep=9")]
    assert [[one.num_keep for one in found] for found in specs] == [[None, 8, 4], [None, None]]


def test_budgets_in_words():
    assert [str(b) for b in (Budget(64), Budget(keep_ratio=0.5), Budget(max_keep=9))] == [
        "64",
        "50%",
        "at most 9",
    ]
    assert str(Budget(keep_ratio=0.5, max_keep=9)) == "50%, at most 9"
    assert [Budget(64).count(10), Budget(keep_ratio=0.5, max_keep=9).count(100)] == [64, 9]


def test_a_cap_beside_stages_of_a_budget_is_refused():
    with pytest.raises(ValueError, match="max_keep=8 would not count: fastv:stages=.* says how"):
        build_specs(["fastv:stages=[[1,K]]"], num_keep=16, max_keep=8)
