"""The network: sizes, queries, decoders, other grids."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.slots.decoder import (
    DecoderConfig,
    MaskedTransformerDecoder,
    PositionEmbedding,
    build_decoder,
)
from ocvtp.slots.queries import GaussianQueries, noise_table


def test_official_parameter_counts():
    with torch.device("meta"):
        network = OCPruner(OCPrunerConfig(decoder=DecoderConfig()))
    decoder = sum(p.numel() for p in network.decoder.parameters())
    assert decoder == 69_288_960
    assert sum(p.numel() for p in network.parameters()) - decoder == 7_616_512


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    network = OCPruner(OCPrunerConfig(hidden_dim=64))
    assert network.encode[1].bias.abs().max() == network.encode[3].bias.abs().max() == 0
    bound = (6 / 1024) ** 0.5
    for parameter in (network.queries.mean, network.queries.logstd):
        assert 0.9 * bound < parameter.abs().max() <= bound


def test_noise_table_is_a_prefix_of_every_longer_one():
    long = noise_table(700, 8, seed=3)
    for rows in (0, 1, 255, 256, 257, 512):
        assert_close(noise_table(rows, 8, seed=3), long[:rows], rtol=0, atol=0)
    assert not torch.equal(long[:5], noise_table(5, 8, seed=4))
    assert abs(float(long.mean())) < 0.05
    assert abs(float(long.std()) - 1) < 0.05


def test_queries_are_fixed_in_evaluation_and_fresh_in_training():
    queries = GaussianQueries(8, num_rows=16)
    assert torch.equal(queries.train()(2, 4), queries.train()(2, 4)) is False
    queries.eval()
    assert_close(queries(2, 4), queries(2, 4), rtol=0, atol=0)
    assert_close(queries(1, 4)[0], queries(3, 9)[2, :4], rtol=0, atol=0)
    longer = queries(1, 300)  # beyond the saved table: the same stream goes on
    assert_close(longer[:, :16], queries(1, 16), rtol=0, atol=0)
    expected = queries.mean + noise_table(300, 8, 0) * queries.logstd.exp()
    assert_close(longer, expected, rtol=0, atol=0)


def test_given_noise_is_used_and_checked(small_network):
    dim = small_network.config.slot_dim
    features = torch.randn(2, 16, small_network.config.feature_dim)
    noise = torch.randn(1, 5, dim)
    one = small_network.assign(features, 5, noise)
    both = small_network.assign(features, 5, noise.expand(2, -1, -1))
    assert_close(one, both)
    with pytest.raises(ValueError, match=r"noise has shape \[3, 5, "):
        small_network.assign(features, 5, torch.randn(3, 5, dim))


def test_assign_is_a_softmax_over_slots_and_batch_invariant(small_network):
    features = torch.randn(3, 16, small_network.config.feature_dim)
    slots, attention = small_network.assign(features, 6)
    assert slots.shape == (3, 6, small_network.config.slot_dim)
    assert_close(attention.sum(dim=1), torch.ones(3, 16))
    for b in range(3):
        single = small_network.assign(features[b : b + 1], 6)
        assert_close((slots[b : b + 1], attention[b : b + 1]), single, rtol=1e-5, atol=1e-6)


def test_wrong_width_is_refused(small_network):
    with pytest.raises(ValueError, match=r"\[B, N, 8\]"):
        small_network.assign(torch.randn(1, 16, 9), 4)


def test_decoding_without_a_decoder_is_refused(small_network):
    with pytest.raises(ValueError, match="--with-decoder"):
        small_network.decode(torch.randn(1, 16, 8), torch.randn(1, 4, 4), (4, 4))


def test_position_embedding_resizes_to_other_grids():
    embedding = PositionEmbedding(6, (4, 4)).double()
    assert_close(embedding((4, 4)), embedding.weight, rtol=0, atol=0)
    assert embedding((3, 7)).shape == (1, 21, 6)
    with torch.no_grad():  # a plane that is constant along rows stays so
        rows = torch.arange(4.0).repeat_interleave(4)
        embedding.weight.copy_(rows[None, :, None].expand(1, 16, 6))
    wide = embedding((4, 8)).unflatten(1, (4, 8))
    assert_close(wide, wide[:, :, :1].expand_as(wide), rtol=1e-6, atol=1e-6)


def test_training_shows_the_drawn_share_of_tokens():
    decoder = MaskedTransformerDecoder(8, 4, (10, 10), DecoderConfig(num_layers=1, num_heads=2))
    torch.manual_seed(0)
    shown = decoder._draw_visible(4000, 100, torch.device("cpu")).sum(dim=1)
    assert ((shown == 10).float().mean() - 0.5).abs() < 0.03  # a fixed tenth, half of the time
    others = shown[shown != 10].float()
    assert others.min() == 0
    assert others.max() == 98
    assert (others.mean() - 49).abs() < 2


def test_visible_modes_differ_only_in_what_is_shown():
    torch.manual_seed(0)
    decoder = MaskedTransformerDecoder(8, 4, (3, 4), DecoderConfig(num_layers=2, num_heads=2))
    features, slots = torch.randn(2, 12, 8), torch.randn(2, 5, 4)
    none = decoder(features, slots, (3, 4), "none")
    decoder._draw_visible = lambda batch, tokens, device, valid: torch.zeros(batch, tokens).bool()
    assert_close(decoder(features, slots, (3, 4), "random"), none)
    decoder._draw_visible = lambda batch, tokens, device, valid: torch.ones(batch, tokens).bool()
    every = decoder(features, slots, (3, 4), "all")
    assert_close(decoder(features, slots, (3, 4), "random"), every)
    assert not torch.allclose(none, every)


def test_masking_in_place_is_permuting_masking_and_unpermuting():
    torch.manual_seed(0)
    decoder = MaskedTransformerDecoder(8, 4, (3, 4), DecoderConfig(num_layers=2, num_heads=2))
    features, slots = torch.randn(1, 12, 8), torch.randn(1, 5, 4)
    order, prefix = torch.randperm(12), 4
    shown = torch.zeros(1, 12, dtype=torch.bool)
    shown[0, order[:prefix]] = True
    decoder._draw_visible = lambda batch, tokens, device, valid: shown
    ours = decoder(features, slots, (3, 4), "random")
    tokens = decoder.project_tokens(features)[:, order].clone()
    tokens[:, prefix:] = decoder.mask_token
    queries = decoder.norm(tokens + decoder.positions((3, 4))[:, order])
    official = decoder.backbone(queries, decoder.project_slots(slots))[:, order.argsort()]
    assert_close(ours, official, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["masked_transformer", "mlp"])
def test_decoders_learn_from_slots(kind):
    torch.manual_seed(0)
    config = DecoderConfig(kind=kind, num_layers=1, num_heads=2, ffn_dim=32)
    decoder = build_decoder(config, 8, 4, (3, 4))
    slots, target = torch.randn(4, 5, 4), torch.randn(4, 12, 8)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (decoder(target, slots, (3, 4)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="masked_transformer"):
        build_decoder(DecoderConfig(kind="cnn"), 8, 4, (3, 4))
