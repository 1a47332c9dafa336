"""`learned` and `learned_layers`: thresholds, choices, and what a network must be made for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_networks import selector

import ocvtp
from ocvtp.learning import artifact
from ocvtp.ops.selection import top_k
from ocvtp.pruners import trainable
from ocvtp.pruners.checks import check_pruner, random_tokens
from ocvtp.pruners.specs import build_spec
from ocvtp.selectors.choices import parse_choice
from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.slots.matching import token_shares
from ocvtp.structures import LayerTokens, Needs, VisualTokens

WIDTH, GRID, COUNT = 8, (4, 3), 12
DEMO_PRUNER = str(Path(__file__).parents[2] / "checkpoints" / "demo-pruner" / "0")


def learned(num_keep=4, scorer="pointwise", **settings):
    network = selector("llm_input", WIDTH, scorer)
    return ocvtp.build_pruner("learned", num_keep=num_keep, network=network, **settings)


def in_layers(scorer="pointwise", config=None, **settings):
    network = selector("llm_layers", WIDTH, scorer, **config or {})
    settings = settings or {"num_keep": 6}
    return ocvtp.build_pruner("learned_layers", network=network, **settings)


def tokens_for(pruner, ragged=False):
    return random_tokens(pruner.needs, 3, GRID, ragged=ragged)


# ---------------------------------------------------------------- learned


def test_the_best_by_score_are_kept():
    pruner = learned()
    tokens = tokens_for(pruner, ragged=True)
    scores = pruner.network(tokens, 4).values
    wanted = top_k(scores, 4, tokens.valid).keep_indices
    assert pruner.select(tokens).keep_indices.equal(wanted)
    smaller = replace(pruner, num_keep=2).select(tokens).keep_indices
    for few, many in zip(smaller.tolist(), wanted.tolist(), strict=True):
        assert set(few) < set(many)


def test_a_choice_replaces_that_of_the_network():
    network = selector("llm_input", WIDTH, choice={"mmr": 0.3})
    tokens = random_tokens(Needs(projected=True), 3, GRID)
    scores = network(tokens, 4).values
    for given, wanted in ((None, {"mmr": 0.3}), ("topk", "topk"), ({"maxmin": 0.1},) * 2):
        pruner = ocvtp.build_pruner("learned", num_keep=4, network=network, choice=given)
        chosen = parse_choice(wanted).select(scores, tokens, 4).keep_indices
        assert pruner.select(tokens).keep_indices.equal(chosen)
    with pytest.raises(ValueError, match="choice='best'; pass 'topk'"):
        ocvtp.build_pruner("learned", num_keep=4, network=network, choice="best")
    spec = build_spec("learned:choice={mmr: 0.3}", num_keep=4, network=network)
    assert spec.choice == {"mmr": 0.3}


def test_a_threshold_counts():
    """As many as exceed it, at least one, at most the budget; the network is told no other K."""
    pruner = learned(None, threshold=0.5)
    assert not pruner.exact
    tokens = tokens_for(pruner, ragged=True)
    scores = pruner.network(tokens).values
    for threshold in (0.01, 0.45, 0.5, 0.55, 0.99):
        for num_keep in (None, 3):
            own = replace(pruner, threshold=threshold, num_keep=num_keep)
            selection = own.select(tokens)
            for b in range(3):
                order = scores[b].masked_fill(~tokens.real[b], -torch.inf).argsort(descending=True)
                above = [int(n) for n in order if scores[b, n].sigmoid() > threshold]
                above = [n for n in above if tokens.real[b, n]] or [int(order[0])]
                found = selection.keep_indices[b][selection.valid[b]].tolist()
                assert found == sorted(above[:num_keep])
    plain = replace(pruner, threshold=None, adaptive=True)
    assert plain.threshold == 0.5


@pytest.mark.parametrize("threshold", [0, 1, -0.5, True, "0.5", float("nan")])
def test_what_is_no_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold=.*; pass a number( between 0 and 1| or None)"):
        learned(threshold=threshold)


def test_without_a_threshold_there_must_be_a_budget():
    with pytest.raises(ValueError, match="learned got num_keep=None and keep_ratio=None; pass"):
        learned(None)


def test_scores_are_in_fp32_whatever_the_caller_computes_in():
    pruner = learned(scorer="prompted")
    tokens = tokens_for(pruner)
    plain = pruner._scores(tokens, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pruner._scores(tokens, 4).equal(plain)


def test_a_model_of_another_width_is_refused():
    pruner = learned()
    tokens = replace(tokens_for(pruner), projected=torch.zeros(3, COUNT, 5))
    with pytest.raises(ValueError, match=r"projected is 5 wide, .* trained on a width of 8; pass"):
        pruner.select(tokens)


def test_each_stage_has_its_own_networks(tmp_path):
    for stage, name, other in (
        ("llm_input", "learned", "learned_layers"),
        ("llm_layers", "learned_layers", "learned"),
    ):
        network = selector(stage, WIDTH)
        network.save_pretrained(tmp_path / name)
        folder = str(tmp_path / name)
        assert trainable.readers(folder) == [name]
        assert trainable.of_network(network).name == name
        assert ocvtp.build_pruner(name, num_keep=9, checkpoint=folder).trained.config.stage == stage
        match = rf"'{other}' acts at stage .*{name} was trained for {stage}.*; build '{name}'"
        with pytest.raises(ValueError, match=match):
            ocvtp.build_pruner(other, num_keep=9, checkpoint=folder)
        with pytest.raises(ValueError, match=f"pruner 'ocvtp' got .* a network of pruner '{name}'"):
            ocvtp.build_pruner("ocvtp", num_keep=9, checkpoint=folder)


CHECKED = {
    "qk_mean": {},
    "local_global": {"dim": 8, "blocks": 1, "heads": 2, "budget": "film"},
    "prompted": {"dim": 8, "blocks": 1, "heads": 2, "budget": "film"},
    "vip": {"kind": "cls", "hidden": [2], "dim": 8, "condition": 8, "heads": 2, "blocks": 1},
    "slots": {"layer": 3, "hidden_dim": 8, "slot_dim": 4, "ffn_dim": 8},
}


@pytest.mark.parametrize("choice", ["topk", {"mmr": 0.5}, {"maxmin": 0.5}], ids=str)
@pytest.mark.parametrize("scorer", CHECKED)
@pytest.mark.sampled(2)
def test_every_scorer_keeps_to_the_contract_of_a_pruner(scorer, choice):
    """Also that the host never waits for the device, and that images are apart."""
    network = selector("llm_input", WIDTH, scorer, sizes=CHECKED[scorer])
    pruner = ocvtp.build_pruner("learned", num_keep=4, network=network, choice=choice)
    check_pruner(pruner, grid_hw=GRID)
    counting = replace(pruner, threshold=0.51)
    tokens = tokens_for(counting, ragged=True)
    together = counting.select(tokens)
    for b in range(3):
        alone = counting.select(tokens.map(lambda t: t[b : b + 1]))  # noqa: B023
        assert alone.keep_indices[0][alone.valid[0]].equal(
            together.keep_indices[b][together.valid[b]]
        )


# ---------------------------------------------------------------- of an OC-pruner


def test_an_oc_pruner_is_read_as_slots(tmp_path):
    """Each token's largest share; also one with a decoder, statistics and a choice of its own."""
    sizes = {"hidden_dim": 16, "slot_dim": 4, "ffn_dim": 8, "standardize": True}
    facts = {"feature_dim": WIDTH, "layer": 3, "num_slots": (2, 4, 8), "grid_hw": GRID}
    facts |= {"target_layer": 2, "choice": "restore", "tower": "t", "objective": "kept"}
    torch.manual_seed(0)
    network = OCPruner(OCPrunerConfig(**sizes, **facts)).eval()
    network.inputs.mean += 1.0
    network.save_pretrained(tmp_path)
    pruner = ocvtp.build_pruner("learned", num_keep=5, checkpoint=str(tmp_path))
    assert trainable.readers(str(tmp_path)) == ["ocvtp"]
    config = pruner.trained.config
    assert (config.scorer, config.choice, config.tower) == ("slots", "topk", "t")
    assert (config.num_slots, config.sizes["num_slots"]) == ((2, 4, 8), 4)
    assert pruner.needs == Needs(hidden=(3,))
    tokens = tokens_for(pruner, ragged=True)
    with torch.no_grad():
        attention = network.assign(tokens.hidden[3], 5, valid=tokens.valid)[1]
    wanted = top_k(token_shares(attention).amax(dim=1), 5, tokens.valid)
    assert pruner.select(tokens).keep_indices.equal(wanted.keep_indices)
    again = replace(pruner, num_keep=3)
    assert again.select(tokens).keep_indices.shape == (3, 3)


def test_the_shipped_one_is_read():
    pruner = ocvtp.build_pruner("learned", num_keep=5, checkpoint=DEMO_PRUNER)
    config = artifact.config_of(DEMO_PRUNER)
    assert pruner.trained.config.widths.tower == config["feature_dim"]
    assert pruner.needs == Needs(hidden=(config["layer"],))


# ---------------------------------------------------------------- inside the language model


def layer_tokens(tower=None, count=COUNT):
    return LayerTokens(
        features=torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(1)),
        grid_hw=(1, count),
        places=torch.arange(count).repeat(2, 1),
        attention={(2, "last"): torch.rand(2, count)},
        tower=tower,
    )


def tower_tokens():
    numbers = torch.Generator().manual_seed(2)
    hidden = {layer: torch.randn(2, COUNT, WIDTH, generator=numbers) for layer in (3, 1)}
    return VisualTokens(hidden[3], GRID, hidden=hidden)


def test_hidden_states_are_read_as_projected_tokens():
    pruner = in_layers()
    assert (pruner.layer, pruner.layers(8)) == (3, (3,))
    tokens = layer_tokens()
    scores = pruner.network(replace(tokens, projected=tokens.features)).values
    found = pruner.select_at(tokens, 3, 5)
    assert found.keep_indices.equal(top_k(scores, 5).keep_indices)


def test_what_the_tower_said_is_looked_up():
    """By the places of the tokens, on the tower's grid while all of them are there."""
    pruner = in_layers("vip")
    assert pruner.tower_needs == Needs(hidden=(3, 1))
    assert pruner.needs_at(3).attention == ((2, "last"),)
    tokens, tower = layer_tokens(tower_tokens()), tower_tokens()
    whole = replace(tower, features=tokens.features, attention=tokens.attention)
    scores = pruner.network(whole).values
    assert pruner.select_at(tokens, 3, 5).keep_indices.equal(top_k(scores, 5).keep_indices)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))[:9]
    part = replace(tokens, features=tokens.features[:, order], places=tokens.places[:, order])
    part = replace(
        part, grid_hw=(1, 9), attention={(2, "last"): tokens.attention[2, "last"][:, order]}
    )
    seen = {layer: values[:, order] for layer, values in tower.hidden.items()}
    by_hand = replace(part, hidden=seen, tower=None)
    scores = pruner.network(by_hand).values
    assert pruner.select_at(part, 3, 5).keep_indices.equal(top_k(scores, 5).keep_indices)
    with pytest.raises(ValueError, match="give it LayerTokens with `tower`"):
        pruner.select_at(layer_tokens(), 3, 5)


def test_a_threshold_counts_before_a_layer():
    tokens = layer_tokens()
    scores = in_layers().network(replace(tokens, projected=tokens.features)).values
    order = scores.argsort(dim=1, descending=True)
    for threshold, most in ((0.5, None), (0.01, 3), (0.5, 3), (0.99, None)):
        stages = {} if most is None else {"stages": ((3, most),)}
        pruner = in_layers(num_keep=None, threshold=threshold, **stages)
        assert not pruner.exact
        (stage,) = pruner.schedule(8, COUNT)
        assert (stage.layer, stage.num_keep) == (3, most or COUNT)
        found = pruner.select_at(tokens, 3, stage.num_keep)
        for row, own in enumerate(order):
            above = [int(n) for n in own if scores[row, n].sigmoid() > threshold][:most]
            kept = found.keep_indices[row]
            kept = kept if found.valid is None else kept[found.valid[row]]
            assert kept.tolist() == sorted(above or [int(own[0])])
    with pytest.raises(ValueError, match=r"threshold=2; pass a number between 0 and 1"):
        in_layers(num_keep=None, threshold=2)
    with pytest.raises(ValueError, match="pass exactly one of them"):
        in_layers(num_keep=None)


def test_positions_are_those_of_the_network():
    for positions in ("contiguous", "original"):
        assert in_layers(config={"positions": positions}).positions == positions


def test_a_model_of_other_layers_is_refused():
    pruner = in_layers(config={"host": {"num_layers": 6}})
    assert pruner.layers(6) == (3,)
    with pytest.raises(ValueError, match="trained in a language model of 6 layers, .* has 8; pass"):
        pruner.layers(8)


def test_stages_are_of_the_layer_that_was_trained():
    assert in_layers(stages=((3, 5),)).schedule(8, COUNT)[0].num_keep == 5
    with pytest.raises(ValueError, match=r"trained to drop tokens before layer 3; pass \(\(3, K\)"):
        in_layers(stages=((2, 5),))
    with pytest.raises(ValueError, match="has no setting 'layer'|unexpected"):
        in_layers(num_keep=4, layer=2)


@pytest.mark.parametrize("changed", [{"block": 4}, {"kind": "cls"}])
def test_what_there_is_not_before_a_layer_is_refused(changed):
    sizes = {"block": 2, "hidden": [3], "dim": 8, "condition": 8, "heads": 2}
    with pytest.raises(
        ValueError, match=r"'vip' reads what there is not before layer 3: .*block=.* may"
    ):
        in_layers("vip", config={"sizes": sizes | changed})
