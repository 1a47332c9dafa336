"""Ridge against the recipe with loops, where its statistics come from, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_contract import WIDTH, image, make_tokens

import ocvtp
from ocvtp.ops.ridge import ridge_error
from ocvtp.pruners.catalog import entry
from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.slots.statistics import FLOOR, FeatureStatistics, standardized
from ocvtp.structures import Needs, VisualTokens, take

GRID = (5, 7)


def oracle(y, attention, num_keep, power=4.0, penalty=0.3):
    """Picks of one image from its centred tokens [N, D], deflating them in fp64."""
    rest = y.double()
    omega = attention.double() ** (power / num_keep)
    omega = omega / omega.mean()
    floor = penalty * (omega * rest.square().sum(dim=1)).mean()
    picks = []
    for _ in range(num_keep):
        scores = []
        for s in range(len(rest)):
            explained = (omega * (rest @ rest[s]).square()).sum()
            scores.append(-1.0 if s in picks else float(explained / (rest[s] @ rest[s] + floor)))
        picks.append(max(range(len(rest)), key=scores.__getitem__))
        row = rest[picks[-1]]
        rest = rest - torch.outer(rest @ row, row) / (row @ row + floor)
    return sorted(picks)


def statistics():
    made = FeatureStatistics(WIDTH)
    made.mean.copy_(torch.linspace(-1, 1, WIDTH))
    made.scale.copy_(torch.linspace(0.5, 2, WIDTH))
    return made


@pytest.mark.parametrize("num_keep", [1, 4, 20])
@pytest.mark.parametrize("weights", ["cls", "received", "none"])
@pytest.mark.parametrize("measured", [False, True])
def test_ridge_is_the_recipe(num_keep, weights, measured):
    settings = {"weights": weights, "statistics": statistics() if measured else None}
    pruner = ocvtp.build_pruner("ridge", num_keep=num_keep, **settings)
    tokens = make_tokens(pruner.needs, 3, GRID, seed=1)
    kept = pruner.select(tokens).keep_indices.tolist()
    for b in range(3):
        one = image(tokens, b)
        y = one.features[0].double()
        if measured:
            y = (y - statistics().mean) / statistics().scale
            y = y - y.mean(dim=0)
        else:
            y = (y - y.mean(dim=0)) / (y.std(dim=0, unbiased=False) + FLOOR)
        attention = torch.ones(35) if weights == "none" else one.attention[-1, weights][0]
        assert kept[b] == oracle(y, attention, num_keep), f"image {b}"


@pytest.mark.parametrize(("power", "penalty"), [(0.0, 0.3), (12.0, 0.3), (4.0, 0.01)])
def test_settings_do_what_they_say(power, penalty):
    pruner = ocvtp.build_pruner("ridge", num_keep=6, block=2, power=power, penalty=penalty)
    assert pruner.needs == Needs(attention=((2, "cls"),))
    tokens = make_tokens(pruner.needs, 1, GRID)
    wanted = oracle(
        standardized(tokens.features)[0], tokens.attention[2, "cls"][0], 6, power, penalty
    )
    assert pruner.select(tokens).keep_indices.tolist() == [wanted]


def test_it_restores_more_than_the_others_do():
    tokens = make_tokens(Needs(projected=True), 20, GRID)
    tokens = replace(tokens, projected=tokens.features)
    targets, errors = standardized(tokens.features), {}
    for name, settings in (("ridge", {"weights": "none"}), ("random", {}), ("divprune", {})):
        keep = ocvtp.build_pruner(name, num_keep=4, **settings).select(tokens).keep_indices
        weights = torch.full((20, 35), 1 / 35)
        errors[name] = float(ridge_error(targets, take(targets, keep), weights).mean())
    assert errors["ridge"] < 0.95 * min(errors["random"], errors["divprune"])


def test_of_a_blank_image_real_tokens_are_kept():
    valid = (torch.arange(35) >= 30)[None]
    tokens = VisualTokens(torch.zeros(1, 35, WIDTH), GRID, valid)
    selection = ocvtp.build_pruner("ridge", num_keep=7, weights="none").select(tokens)
    assert selection.keep_indices[selection.valid].tolist() == [30, 31, 32, 33, 34]


def test_a_checkpoint_brings_its_statistics(tmp_path):
    config = OCPrunerConfig(
        feature_dim=WIDTH, hidden_dim=8, slot_dim=4, ffn_dim=8, noise_rows=8, target_layer=-2
    )
    network = OCPruner(config)
    network.targets.load_state_dict(statistics().state_dict())
    network.save_pretrained(tmp_path / "kept")
    tokens = make_tokens(Needs(attention=((-1, "cls"),)), 2, GRID)
    pruners = [
        ocvtp.build_pruner("ridge", num_keep=5, **settings)
        for settings in ({"statistics_of": str(tmp_path / "kept")}, {"statistics": statistics()})
    ]
    first, second = (p.select(tokens).keep_indices.tolist() for p in pruners)
    assert first == second
    OCPruner(replace(config, target_layer=None)).save_pretrained(tmp_path / "slots")
    with pytest.raises(ValueError, match=r"holds no statistics.*trained for `kept`"):
        ocvtp.build_pruner("ridge", num_keep=5, statistics_of=str(tmp_path / "slots"))
    with pytest.raises(ValueError, match="pass one of them"):
        ocvtp.build_pruner(
            "ridge", num_keep=5, statistics_of=str(tmp_path / "kept"), statistics=statistics()
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "given"}, "pass one of 'cls', 'received', 'none'"),
        ({"penalty": 0.0}, "penalty=0.0.*above 0"),
        ({"power": -1.0}, "power=-1.0.*at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ocvtp.build_pruner("ridge", num_keep=4, **settings)


def test_it_says_that_it_is_ours():
    facts = entry("ridge")
    assert facts.status == "unofficial"
    assert facts.paper is None
