"""Building pruners by name."""

from __future__ import annotations

import numpy as np
import pytest

import ocvtp
from ocvtp.pruners import register
from ocvtp.pruners.methods.fastervlm import FasterVLM
from ocvtp.structures import Needs


def test_names_are_sorted_and_complete():
    names = ocvtp.list_pruners()
    assert names == sorted(names)
    assert {"ocvtp", "random", "uniform", "fastervlm", "none"} <= set(names)


def test_unknown_names_suggest_neighbours():
    with pytest.raises(ValueError, match="unknown pruner 'fastvlm'; did you mean 'fastervlm'"):
        ocvtp.build_pruner("fastvlm", num_keep=4)


def test_unknown_settings_suggest_neighbours():
    with pytest.raises(ValueError, match="no setting 'blok'; did you mean 'block'"):
        ocvtp.build_pruner("fastervlm", num_keep=4, blok=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "pass exactly one of them"),
        ({"num_keep": 4, "keep_ratio": 0.5}, "pass exactly one of them"),
        ({"num_keep": 0}, "at least 1"),
        ({"num_keep": 1.5}, "whole number"),
        ({"num_keep": True}, "whole number"),
        ({"keep_ratio": 0.0}, "share of tokens KEPT"),
        ({"keep_ratio": 1.1}, "share of tokens KEPT"),
    ],
)
def test_wrong_budgets_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ocvtp.build_pruner("uniform", **settings)


@pytest.mark.parametrize(("ratio", "kept"), [(0.001, 1), (0.5, 8), (1 / 3, 5), (1.0, 16)])
def test_keep_ratio_is_what_is_kept(ratio, kept):
    assert ocvtp.build_pruner("uniform", keep_ratio=ratio).budget(16) == kept


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="registered already"):
        register("fastervlm")(FasterVLM)


def test_the_learned_pruner_needs_a_network(small_network):
    with pytest.raises(ValueError, match="checkpoint=.* network="):
        ocvtp.build_pruner("ocvtp", num_keep=4)
    with pytest.raises(ValueError, match="and not both"):
        ocvtp.build_pruner("ocvtp", num_keep=4, checkpoint="x", network=small_network)
    with pytest.raises(ValueError, match="fill='mean'"):
        ocvtp.build_pruner("ocvtp", num_keep=4, network=small_network, fill="mean")


def staged(stage, **needs):
    class Staged(FasterVLM):
        name = f"at_{stage}"

        @property
        def needs(self):
            return Needs(**needs)

    Staged.stage = stage
    return Staged(num_keep=4)


def test_compose_orders_by_stage_and_unites_needs():
    parts = [staged("llm_layers"), staged("pixels", cls=True), staged("llm_input", keys=(3,))]
    both = ocvtp.Compose(parts)
    assert [part.stage for part in both.parts] == ["pixels", "llm_input", "llm_layers"]
    assert both.name == "at_pixels+at_llm_input+at_llm_layers"
    assert both.needs == Needs(keys=(3,), cls=True)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no pruners"),
        ([staged("llm_input"), staged("llm_input")], "both act at stage 'llm_input'"),
    ],
)
def test_compose_refuses(parts, message):
    with pytest.raises(ValueError, match=message):
        ocvtp.Compose(parts)


def test_compose_refuses_needs_that_mean_different_things():
    received = ((2, "received"),)
    parts = [
        staged("llm_input", attention=received, patch_queries=True),
        staged("llm_layers", attention=received),
    ]
    with pytest.raises(ValueError, match="received from patches alone"):
        ocvtp.Compose(parts)


@pytest.mark.parametrize("name", ["trim", "prumerge", "prumerge_plus"])
def test_no_budget_means_the_methods_own_count(name):
    assert ocvtp.build_pruner(name).adaptive
    assert not ocvtp.build_pruner(name, num_keep=4).adaptive
    assert ocvtp.build_pruner(name, num_keep=4, adaptive=True).budget(16) == 4
    assert ocvtp.build_pruner(name).budget(16) == 16
    with pytest.raises(ValueError, match="pass exactly one of them"):
        ocvtp.build_pruner(name, num_keep=4, keep_ratio=0.5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("holov", {"num_crops": 16.0}, "num_crops=16.0; pass a whole number"),
        ("holov", {"block": 1.0}, "block=1.0; pass a whole number"),
        ("kmeans", {"iterations": "2"}, "iterations='2'; pass a whole number"),
        ("random", {"seed": 1.5}, "seed=1.5; pass a whole number"),
        ("todre", {"later": "no"}, "later='no'; pass True or False"),
        ("topv", {"relative": float("nan")}, "relative=nan; pass a number"),
        ("scope", {"alpha": "x"}, "alpha='x'; pass a number"),
        ("scope", {"alpha": 10**400}, "alpha=10.*; pass a number"),
    ],
)
def test_settings_of_another_kind_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=f"pruner '{name}' got {message}"):
        ocvtp.build_pruner(name, num_keep=4, **settings)


def test_whole_numbers_are_numbers_too():
    assert ocvtp.build_pruner("scope", num_keep=4, alpha=np.int64(2)).alpha == 2
