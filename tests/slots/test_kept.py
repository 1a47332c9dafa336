"""The objective `kept`: its loss, what it asks for, and what the pruner then keeps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import ocvtp
from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.slots.config import NetworkSizes
from ocvtp.slots.kept import KeptObjective
from ocvtp.slots.matching import one_to_one, token_shares
from ocvtp.structures import Needs, VisualTokens

SIZES = NetworkSizes(
    hidden_dim=32,
    slot_dim=16,
    ffn_dim=32,
    noise_rows=64,
    dropout=0.0,
    truncation="none",
    frozen_queries=True,
    standardize=True,
    choice="one_to_one",
)
SMALL = OCPrunerConfig(
    **{**vars(SIZES), "hidden_dim": 16, "slot_dim": 4, "ffn_dim": 8},
    feature_dim=8,
    grid_hw=(4, 4),
    layer=3,
    objective="kept",
    target_layer=-2,
)


def network(**changes):
    torch.manual_seed(0)
    made = OCPruner(replace(SMALL, **changes))
    for statistics in (made.inputs, made.targets):
        if statistics is not None:
            statistics.mean.copy_(torch.linspace(-1, 1, 8))
            statistics.scale.copy_(torch.linspace(0.5, 2, 8))
    return made.eval()


def draw(counts, filling=0.0):
    """Images of different numbers of tokens, padded with what would be noticed."""
    rows = {"hidden": [], "target": [], "cls": []}
    most = max(counts)
    for b, count in enumerate(counts):
        generator = torch.Generator().manual_seed(b)
        for name, width in (("hidden", 8), ("target", 8), ("cls", 1)):
            values = torch.randn(most, width, generator=generator)
            values[count:] = filling
            rows[name].append(values)
    stacked = {name: torch.stack(values) for name, values in rows.items()}
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    return VisualTokens(
        features=stacked["target"],
        grid_hw=(4, 4),
        valid=None if min(counts) == most else valid,
        hidden={3: stacked["hidden"], -2: stacked["target"]},
        attention={(-1, "cls"): stacked["cls"].squeeze(2).sigmoid()},
    )


def alone(tokens, b):
    """One image without padding."""
    count = tokens.num_tokens if tokens.valid is None else int(tokens.valid[b].sum())
    return replace(tokens.map(lambda t: t[b : b + 1, :count]), valid=None)


# ------------------------------------------------------------------------- loss


def naive_loss(net, tokens, num_slots, objective, objects=None):
    """One image, by the recipe: S written out, the inverse taken, the greedy solver with loops."""
    _, attention = net.assign(tokens.hidden[3], num_slots)
    shares = (attention / attention.sum(dim=2, keepdim=True))[0]  # [K, N]
    count = shares.shape[1]
    scores, chosen = shares.detach().clone(), {}
    for _ in range(num_slots):
        slot, token = divmod(int(scores.argmax()), count)
        chosen[slot] = token
        scores[slot], scores[:, token] = -1.0, -1.0
    matrix = torch.zeros(num_slots, count)
    for slot, token in chosen.items():
        matrix[slot, token] = 1.0
    matrix = matrix + shares - shares.detach()
    y = (tokens.hidden[-2][0] - net.targets.mean) / net.targets.scale
    y = y - y.mean(dim=0)
    omega = tokens.attention[-1, "cls"][0] ** (objective.weight_power / num_slots)
    if objects is not None:
        omega = omega * (objects[0] + objective.object_floor)
    omega = omega / omega.mean()
    energy = (omega * y.square().sum(dim=1)).mean()
    z = matrix @ y
    inverse = torch.linalg.inv(z @ z.T + objective.penalty * energy * torch.eye(num_slots))
    restored = y @ z.T @ inverse @ z
    error = (omega * (y - restored).square().sum(dim=1)).mean() / energy
    rest, picks = y.clone(), []
    for _ in range(num_slots):
        length = rest.square().sum(dim=1) + objective.penalty * energy
        score = (omega[:, None] * (rest @ rest.T).square()).sum(dim=0) / length
        score[picks] = -1.0
        picks.append(int(score.argmax()))
        row = rest[picks[-1]]
        rest = rest - torch.outer(rest @ row, row) / length[picks[-1]]
    likely = shares[:, picks].log()
    scores, matched = likely.detach().clone(), []
    for _ in range(num_slots):
        slot, place = divmod(int(scores.argmax()), num_slots)
        matched.append(likely[slot, place])
        scores[slot], scores[:, place] = -1e9, -1e9
    return error, -torch.stack(matched).mean()


@pytest.mark.slow
def test_compiled_steps_are_three_graphs_however_many_steps():
    """Of slots and tokens, of the solver, and of slots and its tokens."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    net, tokens, objective = network(), draw([16, 12, 16]), KeptObjective()
    wanted = objective(net, tokens, 9)
    objective.compile_steps("eager")
    for _ in range(2):
        found = objective(net, tokens, 9)
        assert_close(found.loss, wanted.loss, rtol=0, atol=0)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("num_slots", [2, 5, 9])
@pytest.mark.parametrize(("ridge", "teacher"), [(1.0, 0.1), (1.0, 0.0), (0.0, 1.0)])
def test_loss_and_gradient_are_the_recipes(num_slots, ridge, teacher):
    net, tokens = network(), draw([16, 16, 16])
    objective = KeptObjective(ridge=ridge, teacher=teacher)
    outcome = objective(net, tokens, num_slots)
    parts = [naive_loss(net, alone(tokens, b), num_slots, objective) for b in range(3)]
    wanted = sum(ridge * error + teacher * missed for error, missed in parts) / 3
    assert_close(outcome.loss, wanted)
    parameters = [net.queries.mean, net.encode[1].weight, net.attention.gru.weight_ih]
    found = torch.autograd.grad(outcome.loss, parameters)
    assert_close(found, torch.autograd.grad(wanted, parameters), rtol=1e-3, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in found)
    assert_close(outcome.logs["ridge_error"], sum(error for error, _ in parts).detach() / 3)
    assert ("teacher" in outcome.logs) == (teacher > 0)


def test_objects_multiply_the_weights_by_the_covered_shares():
    net, tokens = network(), draw([16, 16])
    objects = torch.zeros(2, 16)
    objects[0, 3:6], objects[1, 9] = torch.tensor([1.0, 0.5, 0.25]), 1.0
    objective = KeptObjective(objects=True, object_floor=0.05)
    outcome = objective(net, tokens, 5, objects)
    parts = [naive_loss(net, alone(tokens, b), 5, objective, objects[b : b + 1]) for b in range(2)]
    assert_close(outcome.loss, sum(error + 0.1 * missed for error, missed in parts) / 2)
    with pytest.raises(ValueError, match="objects=True reads the masks.*the batch has none"):
        objective(net, tokens, 5)


def test_padding_weighs_nothing_with_objects():
    net, objective = network(), KeptObjective(objects=True)
    objects = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    found = [objective(net, draw([16, 9, 13], fill), 5, objects).loss for fill in (0.0, 7.0)]
    assert_close(found[0], found[1])


@pytest.mark.parametrize("num_slots", [5, 12, 20])  # few, more than one image has, than all have
def test_padding_changes_nothing_in_training(num_slots):
    objective, counts = KeptObjective(), [16, 9, 13]
    found = []
    for filling in (0.0, 7.0):
        net = network().train()
        outcome = objective(net, draw(counts, filling), num_slots)
        outcome.loss.backward()
        found.append([outcome.loss, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    tokens = draw(counts)
    singles = [objective(net, alone(tokens, b), num_slots).loss for b in range(3)]
    assert_close(found[0][0], torch.stack(singles).mean())


def test_every_parameter_that_chooses_is_trained():
    net = network().train()
    KeptObjective()(net, draw([16, 16]), 5).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_frozen_queries_are_the_table_in_training_too():
    net = network().train()
    features = draw([16]).hidden[3]
    assert torch.equal(net.assign(features, 5)[1], net.assign(features, 5)[1])
    assert_close(net.assign(features, 5)[1], net.eval().assign(features, 5)[1])
    fresh = network(frozen_queries=False).train()
    assert not torch.equal(fresh.assign(features, 5)[1], fresh.assign(features, 5)[1])


def test_standardized_tokens_are_read():
    features = draw([16]).hidden[3]
    net, raw = network(), network(standardize=False)
    raw.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("inputs.")})
    wanted = raw.assign((features - net.inputs.mean) / net.inputs.scale, 5)
    assert_close(net.assign(features, 5), wanted)
    assert not torch.allclose(net.assign(features, 5)[1], raw.assign(features, 5)[1])


def test_needs_are_two_layers_and_the_attention_of_the_weights():
    attention = ((-1, "cls"),)
    assert KeptObjective().needs(3) == Needs(hidden=(3, -2), attention=attention)
    assert KeptObjective(target_layer=3, weights="none").needs(3) == Needs(hidden=(3,))
    received = KeptObjective(weights="received", weight_block=4).needs(3)
    assert received.attention == ((4, "received"),)
    assert KeptObjective(weights="none", objects=True).reads_objects
    assert not KeptObjective().reads_objects


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "given"}, "pass one of 'cls', 'received', 'none'"),
        ({"objects": True, "object_floor": 0.0}, "object_floor=0.0"),
        ({"penalty": 0.0}, "penalty=0.0.*above 0"),
        ({"weight_power": -1.0}, "weight_power=-1.0"),
        ({"ridge": 0.0, "teacher": 0.0}, "ridge=0.0, teacher=0.0"),
        ({"teacher": -1.0}, "teacher=-1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KeptObjective(**settings)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="choice='best'; pass one of winners, one_to_one, restore"):
        network(choice="best")


# ------------------------------------------------------------- export and pruner


def test_artifacts_without_the_new_settings_load_and_keep_what_they_kept(small_network, tmp_path):
    """What was exported before there was `kept`: no such names in either file."""
    small_network.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name in ("choice", "standardize", "frozen_queries", "target_layer"):
        del values[name]
    path.write_text(json.dumps(values))
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"encode", "queries", "attention"}
    again = OCPruner.from_pretrained(tmp_path)
    assert again.config == small_network.config
    tokens = replace(draw([16, 16]), attention={(-2, "received"): torch.rand(2, 16)})
    kept = [
        ocvtp.build_pruner("ocvtp", num_keep=5, network=net).select(tokens).keep_indices
        for net in (small_network, again)
    ]
    assert torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("counts", [[16, 16, 16], [16, 9, 5]])
def test_the_pruner_keeps_what_the_slots_choose_and_fills_nothing(counts):
    net = network()
    tokens = replace(draw(counts), attention={})
    for num_keep in (1, 5, 16):
        pruner = ocvtp.build_pruner("ocvtp", num_keep=num_keep, network=net)
        assert pruner.needs == Needs(hidden=(3,))
        selection = pruner.select(tokens)
        for b, count in enumerate(counts):
            one = alone(tokens, b)
            kept = min(num_keep, count)
            found = selection.keep_indices[b, :kept].tolist()
            assert selection.counts()[b] == kept
            scores = token_shares(net.assign(one.hidden[3], num_keep)[1])[0]
            wanted = set()
            for _ in range(kept):
                slot, token = divmod(int(scores.argmax()), count)
                wanted.add(token)
                scores[slot], scores[:, token] = -1.0, -1.0
            assert found == sorted(wanted)


def test_more_slots_than_tokens_to_keep():
    net, tokens = network(), draw([16])
    selection = ocvtp.build_pruner("ocvtp", num_keep=3, num_slots=6, network=net).select(tokens)
    wanted = one_to_one(net.assign(tokens.hidden[3], 6)[1], 3)[1]
    assert selection.keep_indices.tolist() == wanted.sort(dim=1).values.tolist()
    with pytest.raises(ValueError, match=r"2 slots cannot choose 3 tokens"):
        ocvtp.build_pruner("ocvtp", num_keep=3, num_slots=2, network=net).select(tokens)


def test_export_keeps_the_selection(tmp_path):
    net, tokens = network(), draw([16, 16])
    net.save_pretrained(tmp_path)
    again = OCPruner.from_pretrained(tmp_path)
    assert again.config == net.config
    for num_keep in (4, 9):
        kept = [
            ocvtp.build_pruner("ocvtp", num_keep=num_keep, network=n).select(tokens).keep_indices
            for n in (net, again, net.without_decoder())
        ]
        assert torch.equal(kept[0], kept[1])
        assert torch.equal(kept[0], kept[2])
