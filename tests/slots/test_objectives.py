"""The area-weighted loss against the official code, and its mended fault."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.slots.decoder import DecoderConfig
from ocvtp.slots.objectives import SlotsObjective, area_weighted_mse, slot_areas, slot_weights
from ocvtp.structures import VisualTokens

# the settings of the reference vectors, in our names
SETTINGS = [
    {},
    {"power": 0.0},
    {"power": 1.0},
    {"cap": None},
    {"cap": 1.0},
    {"normalization": "sum1"},
    {"normalization": "none"},
    {"normalization": "none", "cap": 2.0},
    {"channel_reduction": "sum"},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"power": 0.25, "cap": 3.0, "normalization": "none", "eps": 1e-4},
]


@pytest.mark.parametrize("alpha", ["nonempty", "empty", "skewed"])
@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_legacy_equals_the_official_loss(vectors, index, alpha):
    reference = vectors("aw_mse")
    prediction = reference["pred"].clone().requires_grad_()
    attention = reference[f"alpha.{alpha}"]
    loss = area_weighted_mse(
        prediction, reference["target"], attention, legacy=True, **SETTINGS[index]
    )
    loss.sum().backward()
    expected = reference[f"s{index:02d}.{alpha}.value"]
    assert_close(loss.reshape(-1), expected, rtol=1e-10, atol=1e-10)
    grad = reference[f"s{index:02d}.{alpha}.grad"].double()
    assert_close(prediction.grad, grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_without_empty_slots_both_are_the_same(vectors, index):
    reference = vectors("aw_mse")
    args = (reference["pred"], reference["target"], reference["alpha.nonempty"])
    ours = area_weighted_mse(*args, **SETTINGS[index])
    assert_close(ours, area_weighted_mse(*args, legacy=True, **SETTINGS[index]))


def test_an_empty_slot_weighs_nothing(vectors):
    attention = vectors("aw_mse")["alpha.empty"]
    areas = slot_areas(attention)
    assert_close(areas.long(), vectors("aw_mse")["area.empty"])
    weights = slot_weights(areas)
    assert (weights[areas == 0] == 0).all()
    used = (areas > 0).sum(dim=1)
    assert_close(weights.sum(dim=1) / used, torch.ones(3, dtype=torch.float64))
    official = slot_weights(areas, cap=None, legacy=True)
    assert (official[areas == 0].sum() / official.sum()) > 0.999


def test_naive_reference():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    attention = torch.randn(2, 4, 7).softmax(dim=1)
    losses = []
    for b in range(2):
        owner = [max(range(4), key=lambda k: float(attention[b, k, t])) for t in range(7)]  # noqa: B023
        area = [owner.count(k) for k in range(4)]
        raw = [(a / 7) ** -0.5 if a else 0.0 for a in area]
        mean = sum(raw) / sum(a > 0 for a in area)
        weight = [min(r / mean, 10.0) for r in raw]
        omega = [sum(float(attention[b, k, t]) * weight[k] for k in range(4)) for t in range(7)]
        error = [float(((prediction[b, t] - target[b, t]) ** 2).mean()) for t in range(7)]
        losses.append(sum(o * e for o, e in zip(omega, error, strict=True)) / sum(omega))
    assert_close(area_weighted_mse(prediction, target, attention), torch.tensor(losses).mean())


def test_padding_tokens_do_not_count():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 9, 3), torch.randn(2, 9, 3)
    attention = torch.randn(2, 4, 9).softmax(dim=1)
    valid = torch.arange(9) < 7
    whole = area_weighted_mse(
        prediction, target, attention * valid, valid=valid.expand(2, -1), reduction="none"
    )
    cut = area_weighted_mse(prediction[:, :7], target[:, :7], attention[:, :, :7], reduction="none")
    assert_close(whole, cut)


def test_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="mean1"):
        slot_weights(torch.ones(1, 2), normalization="max")


@pytest.mark.parametrize("kind", ["masked_transformer", "mlp"])
def test_validation_sees_no_token_and_is_repeatable(kind):
    torch.manual_seed(0)
    decoder = DecoderConfig(kind=kind, num_layers=1, num_heads=2, ffn_dim=16)
    config = OCPrunerConfig(
        feature_dim=8, hidden_dim=8, slot_dim=4, ffn_dim=8, grid_hw=(3, 4), decoder=decoder, layer=1
    )
    network = OCPruner(config).eval()
    features = torch.randn(2, 12, 8)
    tokens = VisualTokens(features=features, grid_hw=(3, 4), hidden={1: features})
    objective = SlotsObjective(decoder)
    first, second = objective(network, tokens, 5), objective(network, tokens, 5)
    assert_close(first.loss, second.loss, rtol=0, atol=0)
    # what the decoder is handed besides the slots does not matter: it is all masked
    slots, _ = network.assign(features, 5)
    shown = network.decode(features, slots, (3, 4))
    assert_close(shown, network.decode(torch.zeros_like(features), slots, (3, 4)))
    network.train()
    torch.manual_seed(1)
    loss = objective(network, tokens, 5).loss
    assert not torch.equal(loss, objective(network, tokens, 5).loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_areas_and_weights_are_exact_in_half_precision(dtype):
    """fp16 has no 1e-8, and bf16 no 257."""
    attention = torch.zeros(1, 4, 600, dtype=dtype)
    attention[0, 0, :257] = attention[0, 1, 257:] = 1  # two slots win nothing
    areas = slot_areas(attention)
    assert areas.tolist() == [[257, 343, 0, 0]]
    expected = slot_weights(torch.tensor([[257.0, 343.0, 0.0, 0.0]]))
    assert_close(slot_weights(areas), expected, rtol=0, atol=0)
    assert slot_weights(torch.tensor([[9, 7, 0, 0]], dtype=dtype)).isfinite().all()
    assert slot_weights(torch.tensor([[9, 7, 0]], dtype=dtype), legacy=True).isfinite().all()
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 1, 600, 8).to(dtype)
    loss = area_weighted_mse(prediction, target, attention)
    exact = area_weighted_mse(prediction.double(), target.double(), attention.double())
    assert loss.dtype == torch.float32
    assert_close(loss.double(), exact, rtol=1e-5, atol=0)
