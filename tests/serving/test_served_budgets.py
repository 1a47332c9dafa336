"""How much of an image stays in a server, and what caches must know of it."""

from __future__ import annotations

import pytest

import ocvtp
from ocvtp.hosts.base import Tiling
from ocvtp.pruners.specs import build_spec
from ocvtp.serving.budgets import Budget
from ocvtp.serving.identity import identity_of


@pytest.mark.parametrize(
    ("budget", "asked"),
    [
        (Budget(num_keep=8), [8, 8, 8]),
        (Budget(keep_ratio=0.25), [1, 2, 25]),
        (Budget(keep_ratio=0.25, max_keep=9), [1, 2, 9]),
        (Budget(num_keep=8, max_keep=3), [3, 3, 3]),
        (Budget(max_keep=8), [3, 8, 8]),
        (Budget(), [3, 9, 101]),
    ],
)
def test_tokens_that_are_asked_for(budget, asked):
    """Of images of 2, 8 and 100 tokens; more than these leaves an image as it is."""
    assert [budget.asked(count) for count in (2, 8, 100)] == asked


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        (None, Budget(num_keep=8)),
        ({"num_keep": 4}, Budget(num_keep=4)),
        ({"keep_ratio": 0.5, "pruner": "divprune"}, Budget(keep_ratio=0.5)),
        ({"max_keep": 6}, Budget(num_keep=8, max_keep=6)),
        ({"num_keep": 4, "keep_ratio": None}, Budget(num_keep=4)),
    ],
)
def test_a_request_changes_the_budget(given, budget):
    assert Budget(num_keep=8).of_request(given, "divprune") == budget


def test_a_cap_of_the_spec_counts():
    pruner = build_spec("divprune:keep_ratio=0.5,max_keep=64")
    assert [Budget.of_pruner(pruner).asked(n) for n in (576, 100)] == [64, 50]
    assert Budget.of_pruner(pruner, 9).asked(576) == 9
    assert Budget.of_pruner(build_spec("divprune:max_keep=64"), 99).asked(576) == 64


def test_an_engines_cap_is_not_lifted():
    engine = Budget(num_keep=8, max_keep=10)
    assert engine.of_request({"num_keep": 99, "max_keep": 50}, "divprune").asked(100) == 10
    assert engine.of_request({"num_keep": 99, "max_keep": 5}, "divprune").asked(100) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (64, r"ocvtp=64; pass a budget, e\.g\. \{\"ocvtp\": \{\"num_keep\": 64\}\}"),
        ({"num_keep": 0}, "num_keep=0; pass at least 1 token"),
        ({"num_keep": True}, "pass a whole number of tokens"),
        ({"keep_ratio": 2.0}, "keep_ratio=2.0; pass the share of tokens KEPT"),
        ({"num_keep": 2, "keep_ratio": 0.5}, "got num_keep=2 and keep_ratio=0.5; pass one of them"),
        ({"pruner": "fps"}, "names pruner 'fps', and this engine serves 'divprune'"),
        ({"checkpoint": "/etc"}, "has ocvtp settings checkpoint; a request may set num_keep"),
    ],
)
def test_requests_that_are_no_budget_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Budget(num_keep=8).of_request(given, "divprune")


def test_what_chooses_alike_has_one_identity(small_network):
    def of(name, tiling=None, **settings):
        return identity_of(ocvtp.build_pruner(name, **settings), tiling or Tiling())

    base = of("visionzip", num_keep=8)
    assert base == of("visionzip", num_keep=9) == of("visionzip", keep_ratio=0.5)
    others = [
        of("divprune", num_keep=8),
        of("visionzip", num_keep=8, num_contextual=2),
        of("visionzip", num_keep=8, guidance="received"),
        of("visionzip", Tiling(budget="per_tile"), num_keep=8),
        of("ocvtp", num_keep=8, network=small_network),
    ]
    small_network.queries.mean.data.add_(1e-6)
    others.append(of("ocvtp", num_keep=8, network=small_network))
    assert len({base, *others}) == 1 + len(others)
