"""Building pruners by name."""

from __future__ import annotations

import pytest

import ocvtp
from ocvtp.pruners import register
from ocvtp.pruners.fastervlm import FasterVLM


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
    with pytest.raises(ValueError, match="checkpoint=.* or network="):
        ocvtp.build_pruner("ocvtp", num_keep=4)
    with pytest.raises(ValueError, match="either"):
        ocvtp.build_pruner("ocvtp", num_keep=4, checkpoint="x", network=small_network)
    with pytest.raises(ValueError, match="fill='mean'"):
        ocvtp.build_pruner("ocvtp", num_keep=4, network=small_network, fill="mean")
