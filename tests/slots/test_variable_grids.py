"""Batches of images with different numbers of tokens: each counts as it does alone."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.slots.decoder import DecoderConfig, MaskedTransformerDecoder
from ocvtp.slots.objectives import SlotsObjective
from ocvtp.structures import VisualTokens
from ocvtp.training.metrics import nearest_kept_distance, reconstruction_residual
from ocvtp.training.module import first_views

GRIDS = {
    "variable": torch.tensor([[[3, 4]], [[2, 5]], [[5, 6]]]),
    "joint": torch.tensor([[[3, 4], [5, 3]], [[3, 4], [0, 7]], [[3, 4], [4, 4]]]),
    "per_tile": None,
}
DECODERS = [DecoderConfig(kind=k, num_layers=2, num_heads=2, ffn_dim=16) for k in
            ("masked_transformer", "mlp")]  # fmt: skip


def batch(layout):
    """Three images; what stands on padding would be noticed."""
    torch.manual_seed(1)
    grids = GRIDS[layout]
    if grids is None:  # tiles of a grid of 3 x 4, of which unpadding leaves some rows
        valid = torch.ones(3, 12, dtype=torch.bool)
        valid[1, :4] = False
        valid[2, 8:] = False
    else:
        counts = grids.prod(dim=2).sum(dim=1)
        valid = torch.arange(int(counts.max())) < counts[:, None]
    features = torch.randn(*valid.shape, 8).masked_fill(~valid[:, :, None], 9.0)
    return VisualTokens(features, (3, 4), valid, grids, hidden={1: features})


def alone(tokens, image):
    """One image of it without padding; of tiles, which are on one grid, with it."""
    if tokens.grids is None:
        return tokens.map(lambda t: t[image : image + 1])
    real = tokens.valid[image]
    features = tokens.features[image : image + 1, real]
    grids = tokens.grids[image : image + 1]
    return VisualTokens(features, (3, 4), None, grids, hidden={1: features})


def make(decoder, layout):
    torch.manual_seed(0)
    sizes = {"feature_dim": 8, "hidden_dim": 8, "slot_dim": 4, "ffn_dim": 8, "layer": 1}
    config = OCPrunerConfig(**sizes, grid_hw=(3, 4), layout=layout, decoder=decoder)
    return OCPruner(config).eval()


@pytest.mark.parametrize("layout", GRIDS)
def test_an_image_alone_gets_the_attention_that_it_gets_padded(layout):
    tokens, network = batch(layout), make(None, layout)
    slots, attention = network.assign(tokens.features, 5, valid=tokens.valid)
    assert (attention.masked_select(~tokens.valid[:, None]) == 0).all()
    for image in range(3):
        real = tokens.valid[image]
        single = network.assign(tokens.features[image : image + 1, real], 5)
        expected = (slots[image : image + 1], attention[image : image + 1, :, real])
        assert_close(single, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["variable", "joint"])
@pytest.mark.parametrize("visible", ["none", "all"])
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: d.kind)
def test_an_image_alone_is_decoded_as_it_is_padded(layout, visible, decoder):
    tokens, network, slots = batch(layout), make(decoder, layout), torch.randn(3, 5, 4)
    found = network.decode(tokens.features, slots, tokens.grids, visible, tokens.valid)
    for image in range(3):
        one, own = alone(tokens, image), slots[image : image + 1]
        single = network.decode(one.features, own, one.grids, visible)
        assert_close(found[image : image + 1, tokens.valid[image]], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", GRIDS)
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: d.kind)
def test_the_loss_of_a_batch_is_the_mean_of_its_images(layout, decoder):
    tokens, network = batch(layout), make(decoder, layout)
    objective = SlotsObjective(decoder)
    together = objective(network, tokens, 5)
    singles = [objective(network, alone(tokens, image), 5) for image in range(3)]
    assert_close(together.loss, torch.stack([s.loss for s in singles]).mean())
    for name, value in together.logs.items():
        assert_close(value, torch.stack([s.logs[name] for s in singles]).mean())


@pytest.mark.parametrize("layout", GRIDS)
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: d.kind)
def test_what_stands_on_padding_changes_nothing_in_training(layout, decoder):
    tokens, found = batch(layout), []
    for filling in (9.0, -2.0):
        network = make(decoder, layout).train()
        features = tokens.features.masked_fill(~tokens.valid[:, :, None], filling)
        torch.manual_seed(2)
        other = VisualTokens(features, (3, 4), tokens.valid, tokens.grids, hidden={1: features})
        outcome = SlotsObjective(decoder)(network, other, 5)
        outcome.loss.backward()
        found.append([outcome.loss, *(p.grad for p in network.parameters() if p.grad is not None)])
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_visible_part_is_of_the_real_tokens():
    decoder = MaskedTransformerDecoder(8, 4, (10, 10), DecoderConfig(num_layers=1, num_heads=2))
    torch.manual_seed(0)
    valid = torch.zeros(4000, 100, dtype=torch.bool)
    valid[:, 30:80] = True
    shown = decoder._draw_visible(4000, 100, torch.device("cpu"), valid)
    assert not shown[~valid].any()
    counts = shown.sum(dim=1)
    assert ((counts == 5).float().mean() - 0.5).abs() < 0.04  # a tenth of 50, half of the time
    assert counts.max() == 48


@pytest.mark.parametrize("metric", [nearest_kept_distance, reconstruction_residual])
def test_coverage_leaves_padding_tokens_out(metric):
    tokens = batch("variable")
    keep = torch.tensor([[0, 3, 5], [1, 2, 4], [6, 8, 9]])
    found = metric(tokens.features, keep, None, tokens.valid)
    for image in range(3):
        own = tokens.features[image : image + 1, tokens.valid[image]]
        assert_close(found[image : image + 1], metric(own, keep[image : image + 1]))


def test_masks_are_those_of_the_first_view():
    tokens = batch("joint")
    attention = torch.rand(3, 2, tokens.num_tokens)
    masks = first_views(tokens, attention, 3)
    assert_close(torch.stack(masks), attention[:, :, :12].unflatten(2, (3, 4)), rtol=0, atol=0)
    shapes = [tuple(m.shape) for m in first_views(batch("variable"), torch.rand(3, 2, 30), 3)]
    assert shapes == [(2, 3, 4), (2, 2, 5), (2, 5, 6)]
    assert len(first_views(batch("per_tile"), torch.rand(3, 2, 12), 2)) == 2
