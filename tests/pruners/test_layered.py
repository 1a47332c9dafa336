"""Budgets and schedules of pruners that drop tokens inside the language model."""

from __future__ import annotations

import pytest
import torch

from ocvtp import VisualTokens, build_pruner
from ocvtp.pruners.layer_pruner import LayerStage, to_average


def kept(pruner, num_layers=32, num_tokens=576):
    return [(s.layer, s.num_keep) for s in pruner.schedule(num_layers, num_tokens)]


@pytest.mark.parametrize(
    ("layer", "average", "count"),
    [(2, 192, 166), (2, 128, 98), (2, 64, 30), (3, 192, 152), (3, 128, 82), (3, 64, 11)],
)
def test_fastv_keeps_the_published_counts(layer, average, count):
    assert kept(build_pruner("fastv", num_keep=average, layer=layer)) == [(layer, count)]


def test_fastv_without_a_budget_keeps_half():
    assert kept(build_pruner("fastv")) == [(2, 288)]
    assert kept(build_pruner("fastv"), num_tokens=7) == [(2, 4)]


@pytest.mark.parametrize("num_layers", [4, 28, 32, 40])
@pytest.mark.parametrize("shares", [(1.0,), (4.0, 2.0, 1.0), (300, 200, 110)])
@pytest.mark.parametrize("average", [200, 250.5, 400])
def test_counts_come_to_the_average(num_layers, shares, average):
    layers = [1, 2, 3][: len(shares)]
    stages = to_average(layers, shares, num_layers, 576, average)
    ends = [*layers[1:], num_layers]
    total = 576 * layers[0]
    total += sum(s.num_keep * (end - s.layer) for s, end in zip(stages, ends, strict=True))
    assert abs(total / num_layers - average) <= 0.5
    assert all(1 <= s.num_keep <= 576 for s in stages)


def test_a_stage_keeps_no_more_than_there_are():
    """What the first cannot keep, the others do."""
    stages = to_average((1, 2), (10.0, 1.0), 4, 100, 80)
    assert stages == (LayerStage(1, 100), LayerStage(2, 60))
    assert to_average((1, 2), (2.0, 1.0), 4, 100, 100) == (LayerStage(1, 100), LayerStage(2, 100))


def test_shares_and_counts_of_explicit_stages():
    pruner = build_pruner("fastv", stages=((3, 0.25),))
    assert kept(pruner) == [(3, 144)]
    assert kept(pruner, num_tokens=2) == [(3, 1)]
    assert kept(build_pruner("fastv", stages=((3, 700),))) == [(3, 576)]


def test_ratios_are_of_the_average():
    assert kept(build_pruner("fastv", keep_ratio=1 / 3)) == [(2, 166)]


def test_budgets_above_the_image_keep_it_whole():
    assert kept(build_pruner("fastv", num_keep=600)) == [(2, 576)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": ((2, 5),), "num_keep": 3}, "got stages and a budget; pass stages, or one of"),
        ({"stages": ()}, "pairs with ascending layers"),
        ({"stages": ((2, "many"),)}, "pairs with ascending layers"),
        ({"stages": ((2, 0),)}, "K above 0, e.g."),
        ({"stages": ((2, 5), (3, 4))}, "fastv drops tokens once"),
        ({"num_keep": 3, "keep_ratio": 0.5}, "pass exactly one of them"),
        ({"num_keep": 0}, "pass at least 1 token"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        build_pruner("fastv", **settings)


def test_layers_that_do_not_exist():
    message = "before layers 2, but the language model has 2; pass stages=.* layers 1 to 1"
    with pytest.raises(ValueError, match=message):
        build_pruner("fastv").layers(2)


def test_averages_below_the_first_layers():
    message = "an average of 20 tokens cannot be had: the first 2 of 32 layers read all 576. Pass"
    with pytest.raises(ValueError, match=message + " num_keep=37 or more"):
        build_pruner("fastv", num_keep=20).schedule(32, 576)
    assert kept(build_pruner("fastv", num_keep=37)) == [(2, 1)]


def test_select_is_the_choice_in_front_of_the_first_layer():
    pruner = build_pruner("fastv", num_keep=3)
    assert pruner.needs.attention == ((1, "last"),)
    attention = torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.3]])
    tokens = VisualTokens(torch.zeros(1, 5, 2), (1, 5), attention={(1, "last"): attention})
    assert pruner.select(tokens).keep_indices.tolist() == [[1, 3, 4]]
    assert build_pruner("fastv").select(tokens).keep_indices.tolist() == [[1, 3]]
    assert build_pruner("fastv", stages=((2, 1),)).select(tokens).keep_indices.tolist() == [[3]]


def test_fastv_vectors(vectors):
    """The official code's choice from one layer's attention; its columns begin at the system's."""
    data = vectors("fastv_select")
    start, count = 5, 24
    attention = data["attn"].mean(dim=1)[:, -1, start : start + count]
    names = [name for name in data if name.endswith(".keep")]
    assert names
    for name in names:
        pruner = build_pruner("fastv", num_keep=1)
        expected = data[name]
        images = expected[(expected >= start) & (expected < start + count)] - start
        tokens = VisualTokens(
            torch.zeros(1, count, 2), (1, count), attention={(1, "last"): attention.float()}
        )
        pruner.num_keep = len(images)
        assert pruner.select(tokens).keep_indices[0].tolist() == images.tolist()
