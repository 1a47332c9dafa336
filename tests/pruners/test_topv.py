"""TopV against plain loops."""

from __future__ import annotations

from dataclasses import replace

import naive_halves as naive
import pytest
import torch
from torch.testing import assert_close

import ocvtp
from ocvtp.pruners.layer_pruner import LayerStage
from ocvtp.pruners.methods.topv import mean_costs
from ocvtp.structures import LayerTokens, Needs, VisualTokens


def build(**settings):
    return ocvtp.build_pruner("topv", **({"stages": ((2, 5),)} | settings))


def make_tokens(batch=3, count=11, grid_hw=(4, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = grid_hw[0] * grid_hw[1]
    places = torch.rand(batch, total, generator=generator).argsort(dim=1)[:, :count]
    features, normed = torch.randn(2, batch, count, 6, generator=generator)
    return LayerTokens(
        features=2 * features,
        grid_hw=(1, count),
        places=places.sort(dim=1).values,
        normed={"layer": normed},
        tower=VisualTokens(torch.zeros(batch, total, 3), grid_hw),
    )


SETTINGS = [
    {},
    {"appearance": 0.0},
    {"relative": 0.0, "centre": 1.0},
    {"relative": 0.0, "centre": 0.0},
    {"sigma": 1.0, "entropy": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_cheapest_tokens_stay(settings):
    pruner, tokens = build(**settings), make_tokens()
    kept = pruner.select_at(tokens, 2, 5).keep_indices.tolist()
    for b in range(3):
        x, y = tokens.features[b].tolist(), tokens.normed["layer"][b].tolist()
        at = [(place // 5, place % 5) for place in tokens.places[b].tolist()]
        weights = pruner.appearance, pruner.relative, pruner.centre
        costs = naive.transport_costs(x, y, at, (4, 5), weights, pruner.sigma)
        scores = naive.mean_costs(costs, pruner.entropy)
        found = mean_costs(torch.tensor(costs)[None], pruner.entropy)[0]
        assert_close(found, torch.tensor(scores))
        assert kept[b] == sorted(sorted(range(11), key=lambda i: scores[i])[:5])


def test_every_term_matters():
    tokens = make_tokens(8)
    usual = build(appearance=0.05).select_at(tokens, 2, 5).keep_indices
    for other in ({"appearance": 1.0}, {"relative": 0.0}, {"centre": 0.5}, {"entropy": 5.0}):
        changed = build(**{"appearance": 0.05} | other).select_at(tokens, 2, 5).keep_indices
        assert not usual.equal(changed), other


def test_costs_of_large_states_do_not_overflow():
    tokens = make_tokens()
    large = replace(tokens, features=1e4 * tokens.features)
    assert build().select_at(large, 2, 5).keep_indices.shape == (3, 5)
    scores = mean_costs(torch.rand(1, 40, 40) * 1e3, 0.01)
    assert scores.isfinite().all()


def test_one_stage_to_an_average():
    assert build(stages=None, num_keep=192).schedule(32, 576) == (LayerStage(2, 166),)
    assert build(stages=None, num_keep=64, layer=1).schedule(32, 576) == (LayerStage(1, 47),)
    assert build().layers(3) == (2,)


def test_the_grid_is_asked_for_where_it_is_read():
    assert build().tower_needs == Needs(projected=True)
    assert build(relative=0.0, centre=0.0).tower_needs == Needs()
    tokens = make_tokens()
    with pytest.raises(ValueError, match="give it LayerTokens with `tower`"):
        build().select_at(replace(tokens, tower=None), 2, 5)
    tiles = replace(tokens, tower=VisualTokens(torch.zeros(3, 44, 3), (4, 5)))
    with pytest.raises(ValueError, match="44 tokens are no 4 x 5"):
        build().select_at(tiles, 2, 5)
    with pytest.raises(ValueError, match="give it LayerTokens"):
        build()._select(tokens.tower, 5)


@pytest.mark.parametrize(
    "settings", [{"appearance": -1.0}, {"centre": -0.1}, {"sigma": 0.0}, {"entropy": 0.0}]
)
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match="pass weights of 0 or more, and sigma and entropy above"):
        build(**settings)
