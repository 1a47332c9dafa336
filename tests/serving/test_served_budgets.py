"""How much of an image stays in a server, and what caches must know of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import ocvtp
from ocvtp.hosts.base import Tiling
from ocvtp.pruners.budgets import Budget
from ocvtp.serving.identity import identity_of
from ocvtp.serving.layouts import Shape
from ocvtp.serving.plan import read_plan

VISION = SimpleNamespace(depth=4, hidden_size=32, num_heads=4, spatial_merge_size=2)
TEXT = SimpleNamespace(hidden_size=48, num_hidden_layers=3)
QWEN = SimpleNamespace(model_type="qwen2_5_vl", vision_config=VISION, get_text_config=lambda: TEXT)


SHAPES = {count: Shape((count,)) for count in (2, 8, 100)}


def engine(spec="divprune", **settings):
    """The plan of an engine whose images have any size."""
    return read_plan(QWEN, {"pruner": spec, **settings})


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"num_keep": 8}, [2, 8, 8]),
        ({"keep_ratio": 0.25}, [1, 2, 25]),
        ({"keep_ratio": 0.25, "max_keep": 9}, [1, 2, 9]),
        ({"num_keep": 3, "max_keep": 8}, [2, 3, 3]),
        ({"max_keep": 8}, [2, 8, 8]),
        ({"spec": "none"}, [2, 8, 100]),
        ({"spec": "none", "max_keep": 8}, [2, 8, 100]),
    ],
)
def test_tokens_that_stay(settings, kept):
    """As the pruner itself counts them; more are asked for than an image has where it is spared."""
    plan = engine(**settings)
    asked = {count: plan.asked(shape, plan.budget)[0] for count, shape in SHAPES.items()}
    assert [min(count, own) for count, own in asked.items()] == kept
    assert [own > count for count, own in asked.items()] == [*map(plan.pruner.spares, SHAPES)]


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        (None, Budget(num_keep=8)),
        ({"num_keep": 4}, Budget(num_keep=4)),
        ({"keep_ratio": 0.5, "pruner": "divprune"}, Budget(keep_ratio=0.5, max_keep=10)),
        ({"max_keep": 6}, Budget(num_keep=6)),
        ({"num_keep": 4, "keep_ratio": None}, Budget(num_keep=4)),
        ({"num_keep": 4, "max_keep": 5}, Budget(num_keep=4)),
        ({"keep_ratio": 0.5, "max_keep": 5}, Budget(keep_ratio=0.5, max_keep=5)),
        ({"num_keep": 99}, Budget(num_keep=10)),  # an engine's cap is not lifted
        ({"keep_ratio": 0.5, "max_keep": 50}, Budget(keep_ratio=0.5, max_keep=10)),
    ],
)
def test_a_request_changes_the_budget(given, budget):
    assert engine(num_keep=8, max_keep=10).of_request(given) == budget


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (64, r"ocvtp=64; pass a budget, e\.g\. \{\"ocvtp\": \{\"num_keep\": 64\}\}"),
        ({"num_keep": 0}, "num_keep=0; pass at least 1 token"),
        ({"num_keep": True}, "pass a whole number of tokens"),
        ({"max_keep": 2.0}, "max_keep=2.0; pass a whole number of tokens"),
        ({"keep_ratio": 2.0}, "keep_ratio=2.0; pass the share of tokens KEPT"),
        ({"num_keep": 2, "keep_ratio": 0.5}, "request got num_keep=2 and keep_ratio=0.5; pass exa"),
        ({"num_keep": 9, "max_keep": 8}, "the request got num_keep=9 and max_keep=8, but max_keep"),
        ({"pruner": "fps"}, "names pruner 'fps', and this engine serves 'divprune'"),
        ({"checkpoint": "/etc"}, "has ocvtp settings checkpoint; a request may set num_keep"),
    ],
)
def test_requests_that_are_no_budget_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        engine(num_keep=8).of_request(given)


def test_what_chooses_alike_has_one_identity(small_network):
    def of(name, tiling=None, **settings):
        return identity_of(ocvtp.build_pruner(name, **settings), tiling or Tiling())

    base = of("visionzip", num_keep=8)
    assert base == of("visionzip", num_keep=9) == of("visionzip", keep_ratio=0.5, max_keep=8)
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
