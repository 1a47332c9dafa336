"""The choice `restore` of a trained OC-pruner, against loops from its description."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_kept import alone, draw, network
from torch.testing import assert_close

import ocvtp
from ocvtp.slots import OCPruner
from ocvtp.slots.choosing import restore
from ocvtp.slots.kept import KeptObjective
from ocvtp.slots.matching import one_to_one
from ocvtp.structures import Needs


def naive(attention, targets, num):
    """One image: attention [S, N], targets [N, D]; the residuals deflated and compared anew."""
    weights = (attention / attention.sum(dim=1, keepdim=True)).amax(dim=0).detach()
    held = sorted(range(len(weights)), key=lambda n: -float(weights[n]))[: 3 * num]
    rest = (targets - targets.mean(dim=0))[held]
    omega = weights[held] / weights[held].sum()
    floor = 0.3 * float((omega * rest.square().sum(dim=1)).sum())
    picks = []
    for _ in range(num):
        length = rest.square().sum(dim=1) + floor
        score = (omega[:, None] * (rest @ rest.T).square()).sum(dim=0) / length
        score[picks] = -1.0
        picks.append(int(score.argmax()))
        row = rest[picks[-1]]
        rest = rest - torch.outer(rest @ row, row) / length[picks[-1]]
    return [held[m] for m in picks]


@pytest.mark.parametrize(("slots", "num"), [(3, 3), (6, 2), (2, 4), (5, 12)])
def test_restore_is_the_naive_one(slots, num):
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(4, slots, 16, generator=generator).mul(2).softmax(dim=1)
    targets = torch.randn(4, 16, 5, generator=generator)
    wanted = [naive(a, t, num) for a, t in zip(attention, targets, strict=True)]
    assert restore(attention, targets, num).tolist() == wanted


def test_an_object_that_two_slots_hold_is_kept_once():
    # tokens 0 and 1 are one object that slots 0 and 1 hold, token 2 another one, the rest is ground
    attention = torch.full((1, 4, 9), 0.02)
    attention[0, 0, :2], attention[0, 1, :2] = torch.tensor([0.5, 0.44]), torch.tensor([0.44, 0.5])
    attention[0, 2, 2], attention[0, 2, 3:], attention[0, 3, 3:] = 0.4, 0.2, 0.7
    attention = attention / attention.sum(dim=1, keepdim=True)
    targets = torch.zeros(1, 9, 3)
    targets[0, :2, 0], targets[0, 2, 1] = 1.0, 1.0
    assert sorted(one_to_one(attention, 2)[1][0].tolist()) == [0, 1]
    assert sorted(restore(attention, targets, 2)[0].tolist()) in ([0, 2], [1, 2])


@pytest.mark.parametrize("counts", [[16, 16], [16, 9], [16, 4]])
def test_the_pruner_restores_and_padding_changes_nothing(counts):
    net, tokens = network(choice="restore"), replace(draw(counts, filling=7.0), attention={})
    pruner = ocvtp.build_pruner("ocvtp", num_keep=6, network=net)
    assert pruner.needs == Needs(hidden=(3, -2))
    selection = pruner.select(tokens)
    for b, count in enumerate(counts):
        one, kept = alone(tokens, b), min(6, count)
        attention = net.assign(one.hidden[3], 6)[1][0]
        wanted = sorted(naive(attention, net.targets(one.hidden[-2])[0], kept))
        assert selection.counts()[b] == kept
        assert selection.keep_indices[b, :kept].tolist() == wanted
    other = OCPruner(replace(net.config, choice="one_to_one"))
    other.load_state_dict(net.state_dict())
    kept = ocvtp.build_pruner("ocvtp", num_keep=6, network=other.eval()).select(tokens)
    assert not torch.equal(kept.keep_indices[0], selection.keep_indices[0])


def test_training_is_the_same_whether_or_not_the_pruner_restores():
    tokens = draw([16, 16])
    found = [KeptObjective()(network(**c), tokens, 5).loss for c in ({}, {"choice": "restore"})]
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_restore_without_what_it_reads_is_refused():
    with pytest.raises(ValueError, match="choice='restore'.*this OC-pruner has none"):
        network(choice="restore", target_layer=None)
    net = network(choice="restore")
    with pytest.raises(ValueError, match="early=True.*choice='one_to_one'"):
        ocvtp.build_pruner("ocvtp", num_keep=4, network=net, early=True)


def test_the_choice_of_a_pruner_goes_before_that_of_its_network():
    net, other = network(choice="restore"), network(choice="one_to_one")
    tokens = draw([16, 16])
    pruners = [
        ocvtp.build_pruner("ocvtp", num_keep=5, network=net, choice="one_to_one"),
        ocvtp.build_pruner("ocvtp", num_keep=5, network=other),
    ]
    assert (
        pruners[0].needs
        == pruners[1].needs
        != ocvtp.build_pruner("ocvtp", num_keep=5, network=net).needs
    )
    one, two = (pruner.select(tokens).keep_indices for pruner in pruners)
    assert torch.equal(one, two)
    early = ocvtp.build_pruner("ocvtp", num_keep=5, network=net, choice="one_to_one", early=True)
    assert early.stage == "encoder"
    with pytest.raises(ValueError, match="pass one of winners"):
        ocvtp.build_pruner("ocvtp", num_keep=5, network=net, choice="best")
