"""The loss of the paper's slots: as the objective of that name, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ocvtp.selectors.losses import Step, build_losses
from ocvtp.selectors.scorer import Widths, build_scorer
from ocvtp.slots.decoder import DecoderConfig
from ocvtp.slots.objectives import SlotsObjective
from ocvtp.structures import VisualTokens

SIZES = {"layer": 2, "num_slots": 3, "hidden_dim": 16, "slot_dim": 8, "ffn_dim": 16, "dropout": 0.0}
WIDTHS, GRID = Widths(projected=6, tower=8), (3, 4)
DECODERS = (
    {"kind": "mlp", "num_layers": 1, "ffn_dim": 16},
    {"num_layers": 1, "num_heads": 2, "ffn_dim": 16},
)


def made(decoder, **more):
    """A scorer, and the loss for it."""
    torch.manual_seed(0)
    scorer = build_scorer("slots", SIZES, WIDTHS)
    (loss,) = build_losses({"slots": {"decoder": decoder, **more}})
    loss.build(scorer, WIDTHS, GRID)
    return scorer, loss


def drawn(ragged=False):
    torch.manual_seed(1)
    features = torch.randn(2, 12, 8)
    valid = None
    if ragged:
        valid = torch.ones(2, 12, dtype=torch.bool)
        valid[1, 8:] = False
        features[1, 8:] = 1e4
    return VisualTokens(features=features, grid_hw=GRID, hidden={2: features}, valid=valid)


def step_of(scorer, tokens, num_keep=3):
    scores = scorer(tokens, num_keep)
    return Step(tokens=tokens, num_keep=num_keep, share=0.0, scores=scores.values, aux=scores.aux)


@pytest.mark.parametrize("decoder", DECODERS, ids=["mlp", "transformer"])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_objective_of_that_name(decoder, training):
    scorer, loss = made(decoder, power=0.7, cap=2.0)
    scorer.train(training)
    loss.train(training)
    network = scorer.network
    network.decoder = loss.decode
    tokens = drawn()
    torch.manual_seed(3)
    objective = SlotsObjective(DecoderConfig(**decoder), power=0.7, cap=2.0)
    expected = objective(network, tokens, 3)
    torch.manual_seed(3)
    found = loss(step_of(scorer, tokens))
    assert found.values.shape == (2,)
    assert_close(found.mean(), expected.loss)


@pytest.mark.parametrize("decoder", DECODERS, ids=["mlp", "transformer"])
def test_padding_and_batch_mates_change_nothing(decoder):
    scorer, loss = (module.eval() for module in made(decoder))
    tokens = drawn(ragged=True)
    both = loss(step_of(scorer, tokens)).values
    assert both.isfinite().all()
    other = tokens.features.clone()
    other[1, 8:] = -7.0
    moved = replace(tokens, features=other, hidden={2: other})
    assert_close(loss(step_of(scorer, moved)).values, both)
    alone = replace(
        tokens,
        features=tokens.features[:1], hidden={2: tokens.features[:1]}, valid=tokens.valid[:1],
    )  # fmt: skip
    assert_close(loss(step_of(scorer, alone)).values, both[:1])


def test_slots_and_decoder_learn():
    scorer, loss = made(DECODERS[0])
    loss(step_of(scorer, drawn())).mean().backward()
    learnt = [*loss.parameters(), *scorer.network.encode.parameters()]
    assert all(float(p.grad.abs().sum()) > 0 for p in learnt)


def test_what_it_cannot_restore_is_refused():
    (loss,) = build_losses({"slots": {}})
    scorer = build_scorer("pointwise", {}, WIDTHS)
    with pytest.raises(ValueError, match="'pointwise' has none; pass .*Slots"):
        loss.build(scorer, WIDTHS, GRID)
    scorer, loss = made(DECODERS[0])
    views = replace(drawn(), grid_hw=(1, 5))
    with pytest.raises(ValueError, match="images are several views here"):
        loss(step_of(scorer, views))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"decoder": {"kinds": "mlp"}}, "losses.slots: .*kinds"),
        ({"decoder": {"kind": "linear"}}, "losses.slots: .*linear"),
        ({"decoder": "mlp"}, "decoder='mlp'; pass a mapping"),
        ({"power": -1}, "power=-1; pass a number of at least 0"),
        ({"cap": 0}, "cap=0; pass a number above 0"),
        ({"legacy": 1}, "legacy=1; pass true or false"),
    ],
)
def test_wrong_settings_are_one_line(given, words):
    with pytest.raises(ValueError, match=words):
        build_losses({"slots": given})


def test_settings_make_the_same_again():
    _, loss = made(DECODERS[0], weight={"linear": [0.5, 1.0]}, cap=None)
    (again,) = build_losses({"slots": loss.settings()})
    assert again.settings() == loss.settings()
    assert loss.settings()["decoder"] == DECODERS[0]
