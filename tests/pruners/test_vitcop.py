"""ViTCoP against the official code's vectors, the paper's counts and plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import ocvtp
from ocvtp.ops.clustering import density_peaks, keep_in_clusters, shared_out
from ocvtp.ops.merging import head_mean
from ocvtp.pruners.layer_pruner import LayerStage
from ocvtp.pruners.two_stage import of_tower, tower_places
from ocvtp.structures import LayerTokens, Needs, VisualTokens

OFFSET = 7
"""Tokens of the vectors stand behind so many others."""


def halves(**settings):
    return ocvtp.build_pruner("vitcop", **settings).parts


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scored(batch=1, count=576, valid=None):
    attention = {(-2, "cls"): random(batch, count).softmax(dim=1)}
    return VisualTokens(torch.zeros(batch, count, 4), (1, count), valid, attention=attention)


# ------------------------------------------------------------------------ quotas and merged groups


@pytest.mark.parametrize("num_keep", [4, 12, 20])
@pytest.mark.parametrize("share", ["0.12", "0.18"])
def test_clusters_keep_what_they_do_officially(vectors, share, num_keep):
    reference = vectors("vitcop")
    labels, key = reference[f"labels_p{share}"][None], f"p{share}_R{num_keep}"
    count = int(labels.max()) + 1
    assert count == int(float(share) * 48)
    selection = keep_in_clusters(labels, count, reference["k_l2"][None], num_keep)
    singles, means = reference[f"{key}.selected"] - OFFSET, reference[f"{key}.merged_pos"] - OFFSET
    assert selection.anchors[0].tolist() == sorted(singles.tolist()) + means.tolist()
    assert selection.keep_indices[0].tolist() == sorted(singles.tolist() + means.tolist())
    groups = reference[f"{key}.group_of_token"].tolist()
    for row, single in zip(selection.merge[0], sorted(singles.tolist()), strict=False):
        assert groups[single] == -1
        assert row.nonzero()[:, 0].tolist() == [1 + single]
    for group, row in enumerate(selection.merge[0, len(singles) :]):
        members = [1 + token for token, own in enumerate(groups) if own == group]
        assert row.nonzero()[:, 0].tolist() == members
        assert_close(row[members], torch.full((len(members),), 1 / len(members)))


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_quotas_are_exact_and_fit(seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(15):
        count = int(torch.randint(1, 9, (), generator=generator))
        sizes = torch.randint(1, 9, (5, count), generator=generator)
        sizes[:, -1] += sizes.sum(dim=1).max() - sizes.sum(dim=1)  # equally many tokens
        for total in range(int(sizes[0].sum()) - count + 1):
            quotas = shared_out(sizes, total)
            assert quotas.sum(dim=1).tolist() == [total] * 5
            assert ((quotas >= 0) & (quotas < sizes)).all()
            alone = [shared_out(row[None], total)[0].tolist() for row in sizes]
            assert quotas.tolist() == alone


@pytest.mark.parametrize("num_keep", [1, 2, 4, 5, 29, 30])
def test_every_token_is_in_one_row(num_keep):
    points = random(3, 30, 4)
    labels, _ = density_peaks(points, 4)
    selection = keep_in_clusters(labels, 4, random(3, 30, seed=1), num_keep)
    assert selection.merge.shape == (3, num_keep, 31)
    assert ((selection.merge[:, :, 1:] > 0).sum(dim=1) == 1).all()
    assert_close(selection.merge.sum(dim=2), torch.ones(3, num_keep))


# ------------------------------------------------------------ the paper's counts


@pytest.mark.parametrize(
    ("num_keep", "before", "inside"),
    [(192, 288, (253, 51)), (128, 230, (165, 33)), (64, 172, (77, 15))],
)
@pytest.mark.parametrize("as_share", [False, True])
def test_the_published_settings(num_keep, before, inside, as_share):
    budget = {"keep_ratio": num_keep / 576} if as_share else {"num_keep": num_keep}
    first, later = halves(**budget)
    selection = first.select(scored())
    assert selection.valid is None
    assert selection.keep_indices.shape == (1, before)
    stages = later.schedule(32, before)
    assert [stage.layer for stage in stages] == [2, 22]
    assert [stage.num_keep for stage in stages] == pytest.approx(inside, abs=as_share)
    share = {192: 0.18, 128: 0.15, 64: 0.12}[num_keep]
    assert later._num_clusters(before) == int(share * before)


@pytest.mark.parametrize("num_layers", [28, 32, 40])
@pytest.mark.parametrize("num_keep", [50, 100, 300, 500, 576])
def test_a_budget_is_an_average(num_layers, num_keep):
    first, later = halves(num_keep=num_keep)
    before = first.select(scored()).keep_indices.shape[1]
    (start, one), (end, two) = ((s.layer, s.num_keep) for s in later.schedule(num_layers, before))
    total = start * before + (end - start) * one + (num_layers - end) * two
    assert total / num_layers == pytest.approx(num_keep, abs=0.6)
    assert before >= one >= two


def test_explicit_stages():
    first, later = halves(num_keep=40, stages=((1, 20), (3, 0.25)))
    assert first.select(scored()).keep_indices.shape == (1, 40)
    assert later.schedule(6, 40) == (LayerStage(1, 20), LayerStage(3, 10))
    assert later._num_clusters(40) == 6


def test_padding_changes_no_count():
    """An image keeps as many beside a larger one as alone."""
    valid = torch.arange(576) < torch.tensor([[576], [300], [64], [30]])
    for budget in ({"num_keep": 64}, {"keep_ratio": 1 / 9}):
        first, _ = halves(**budget)
        together = first.select(scored(4, valid=valid))
        for b, count in enumerate([576, 300, 64, 30]):
            tokens = scored(4)
            alone = replace(
                tokens.map(lambda t, b=b, n=count: t[b : b + 1, :n]), grid_hw=(1, count)
            )
            if count == 30 and "num_keep" in budget:
                expected = list(range(30))
            else:
                expected = first.select(alone).keep_indices[0].tolist()
            kept = together.keep_indices[b][together.valid[b]].tolist()
            assert kept == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": "mean"}, "guidance='mean'; pass 'cls' or 'received'"),
        ({"cluster_share": 0.0}, "cluster_share=0.0; pass a share"),
        ({"stages": ((3, 5), (1, 2))}, "ascending layers"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        halves(**{"num_keep": 64} | settings)[0].select(scored())


# ------------------------------------------------------------ inside the language model


def layer_tokens(batch=2, count=30, seed=0):
    """30 of 40 tokens of the tower, and two separators among them."""
    places = random(batch, 40, seed=seed + 9).argsort(dim=1)[:, :count].sort(dim=1).values
    places[:, 7], places[:, 21] = -1, -1
    tower = VisualTokens(
        torch.zeros(batch, 40, 4),
        (5, 8),
        keys={-2: random(batch, 40, 8, seed=seed + 1)},
        num_heads=2,
    )
    return LayerTokens(
        features=random(batch, count, 6, seed=seed + 2),
        grid_hw=(1, count),
        places=places,
        keys={layer: random(batch, count, 12, seed=seed + layer) for layer in (3, 5)},
        num_heads=3,
        tower=tower,
    )


def test_separators_are_looked_up_as_the_token_before():
    tokens = layer_tokens(1)
    expected = tokens.places[0].tolist()
    expected[7], expected[21] = expected[6], expected[20]
    assert tower_places(tokens)[0].tolist() == expected
    assert of_tower(tokens, tokens.tower.keys[-2])[0, 7].equal(
        tokens.tower.keys[-2][0, expected[6]]
    )
    first = replace(tokens, places=torch.full_like(tokens.places, -1))
    assert tower_places(first).tolist() == [[0] * 30]


def test_the_first_stage_merges_clusters_of_the_towers_keys():
    _, later = halves(num_keep=32, stages=((4, 12), (6, 5)), cluster_share=0.2)
    tokens = layer_tokens()
    assert later.tower_needs == Needs(keys=(-2,))
    assert later.needs_at(4).keys == (3,)
    selection = later.select_at(tokens, 4, 12)
    lengths = tokens.keys[3].unflatten(2, (3, 4)).mean(dim=2).norm(dim=2)
    points = head_mean(of_tower(tokens, tokens.tower.keys[-2]), 2)
    expected = keep_in_clusters(density_peaks(points, 6)[0], 6, lengths, 12)
    assert selection.keep_indices.equal(expected.keep_indices)
    assert selection.merge.equal(expected.merge)


def test_the_second_stage_keeps_the_shortest_keys():
    _, later = halves(num_keep=32, stages=((4, 12), (6, 5)))
    tokens = replace(layer_tokens(), tower=None)
    lengths = tokens.keys[5].unflatten(2, (3, 4)).mean(dim=2).norm(dim=2)
    selection = later.select_at(tokens, 6, 5)
    assert selection.merge is None
    for kept, own in zip(selection.keep_indices, lengths, strict=True):
        assert kept.tolist() == sorted(own.argsort()[:5].tolist())


def test_without_a_tower_there_are_no_clusters():
    _, later = halves(num_keep=32, stages=((4, 12),))
    with pytest.raises(ValueError, match="give it LayerTokens with `tower`"):
        later.select_at(replace(layer_tokens(), tower=None), 4, 12)
    assert later.select_at(replace(layer_tokens(), tower=None), 4, 30).merge is None
