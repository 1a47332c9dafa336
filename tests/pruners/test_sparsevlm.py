"""SparseVLM against the official code's vectors, plain loops and the paper's counts."""

from __future__ import annotations

import naive_layers as naive
import pytest
import torch
from torch.testing import assert_close

import ocvtp
from ocvtp.ops.clustering import density_peaks
from ocvtp.ops.merging import merge
from ocvtp.pruners.layer_pruner import LayerStage
from ocvtp.structures import LayerTokens, VisualTokens, take

LAYERS = (3, 7, 16)


def counts(num_layers=32, num_tokens=576, **settings):
    schedule = ocvtp.build_pruner("sparsevlm", **settings).schedule(num_layers, num_tokens)
    assert tuple(stage.layer for stage in schedule) == LAYERS
    return [stage.num_keep for stage in schedule]


def average(kept, num_layers=32, num_tokens=576):
    ends = [*LAYERS[1:], num_layers]
    parts = [n * (end - start) for n, start, end in zip(kept, LAYERS, ends, strict=True)]
    return (LAYERS[0] * num_tokens + sum(parts)) / num_layers


def embeddings(image, text, valid=None):
    """[1, N, D] and [1, M, D] as a pruner's raters see them."""
    valid = torch.ones(text.shape[:2], dtype=torch.bool) if valid is None else valid
    places = torch.arange(image.shape[1]).expand(len(image), -1)
    grid_hw = (1, image.shape[1])
    return LayerTokens(features=image, grid_hw=grid_hw, places=places, text=text, text_valid=valid)


def scored(features, scores, layer):
    key = (layer - 1, "text")
    return VisualTokens(features, (1, features.shape[1]), attention={key: scores})


@pytest.mark.parametrize("kind", ["zero", "rand"])
@pytest.mark.parametrize("num_clusters", [1, 3, 5])
def test_clusters_are_the_official_ones(vectors, kind, num_clusters):
    reference = vectors("sparsevlm_cluster_merge")
    points, noise = reference["x"], 1e-6 * reference["noise"] if kind == "rand" else None
    clusters, _ = density_peaks(points, num_clusters, noise)
    means = [points[0][clusters[0] == i].mean(dim=0) for i in range(num_clusters)]
    assert_close(torch.stack(means)[None], reference[f"c{num_clusters}.{kind}"])


@pytest.mark.parametrize("num_clusters", [1, 2, 6, 14])
def test_clusters_equal_plain_loops(num_clusters):
    points = torch.randn(2, 14, 5, generator=torch.Generator().manual_seed(0)).double()
    clusters, centres = density_peaks(points, num_clusters)
    for image, own, peaks in zip(points, clusters, centres, strict=True):
        expected = naive.clusters(image, num_clusters)
        assert peaks.tolist() == [centre for centre, _ in expected]
        for number, (_, members) in enumerate(expected):
            assert (own == number).nonzero().flatten().tolist() == sorted(members)


def test_noise_breaks_ties_between_dense_places():
    points = torch.tensor([[[0.0], [0.0], [9.0], [9.0]]])
    assert density_peaks(points, 2)[1].tolist() == [[0, 2]]
    noise = torch.tensor([[0.0, 1e-6, 0.0, 2e-6]])
    assert density_peaks(points, 2, noise)[1].tolist() == [[3, 1]]


def test_raters_are_the_official_ones(vectors):
    reference = vectors("sparsevlm_raters")
    start, end = int(reference["v_start"]), int(reference["v_start"] + reference["v_len"])
    tokens = embeddings(reference["hidden"][:, start:end], reference["hidden"][:, end:])
    raters = ocvtp.build_pruner("sparsevlm", num_keep=64).raters(tokens)
    assert raters[0].nonzero().flatten().tolist() == reference["rater_idx"].tolist()


def test_raters_equal_plain_loops():
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(3, n, 4, generator=generator) for n in (11, 7))
    lengths = [7, 4, 1]
    valid = torch.arange(7) < torch.tensor(lengths)[:, None]
    raters = ocvtp.build_pruner("sparsevlm", num_keep=64).raters(embeddings(image, text, valid))
    for b, length in enumerate(lengths):
        expected = naive.raters(image[b], text[b, :length])
        assert raters[b].nonzero().flatten().tolist() == expected
    assert raters.sum(dim=1).tolist() != lengths  # not everybody


def test_three_stages_are_the_official_ones(vectors):
    """Each stage reads what the one before has left, recycled tokens included."""
    reference = vectors("sparsevlm_v1_0_192")
    hidden = reference["hidden"].float()
    start, length = int(reference["v_start"]), int(reference["v_len"])
    pruner = ocvtp.build_pruner("sparsevlm", setting="paper-192")
    assert pruner.positions == "contiguous"
    for i, stage in enumerate(pruner.schedule(32, length)):
        image = hidden[:, start : start + length]
        rows = reference[f"s{i}.rater_rows"].float()[..., start : start + length]
        tokens = scored(image, rows.mean(dim=(1, 2)), stage.layer)
        selection = pruner.select_at(tokens, stage.layer, stage.num_keep)
        kept = reference[f"s{i}.mask"][0].nonzero().flatten()
        num_clusters = int(reference[f"s{i}.cluster_num"])
        assert selection.anchors[0, : len(kept)].equal(kept)
        assert selection.anchors.shape[1] == len(kept) + num_clusters == stage.num_keep
        left = merge(tokens, selection.merge)
        assert left[:, : len(kept)].equal(image[:, kept])
        assert_close(left[:, len(kept) :], reference[f"s{i}.merged"])
        hidden = torch.cat([hidden[:, :start], left, hidden[:, start + length :]], dim=1)
        length = left.shape[1]
        assert hidden.shape[1] == reference[f"s{i}.position_ids"].shape[1]
    assert_close(hidden, reference["out"])


@pytest.mark.parametrize(("num_tokens", "num_keep"), [(90, 12), (40, 39), (25, 2), (12, 1)])
def test_a_stage_equals_plain_loops(num_tokens, num_keep):
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, num_tokens, 6, generator=generator)
    scores = torch.rand(2, num_tokens, generator=generator)
    pruner = ocvtp.build_pruner("sparsevlm", stages=((3, num_keep),))
    tokens = scored(features, scores, 3)
    selection = pruner.select_at(tokens, 3, num_keep)
    mixed = take(features, selection.keep_indices)
    if selection.merge is not None:
        mixed = merge(tokens, selection.merge)
    for b in range(2):
        num_kept = naive.without_recycled(num_keep, num_tokens)
        kept, spare, _ = naive.sparsevlm(scores[b].tolist(), num_kept)
        rows, anchors = [features[b, i] for i in kept], kept
        if num_keep > num_kept:
            for centre, members in naive.clusters(features[b, spare], num_keep - num_kept):
                rows.append(features[b, spare][members].mean(dim=0))
                anchors.append(spare[centre])
        assert_close(mixed[b], torch.stack(rows))
        assert selection.keep_indices[b].tolist() == sorted(anchors)
        assert selection.anchors is None or selection.anchors[b].tolist() == anchors


def _clusters(num_dropped):
    return naive.sparsevlm([0.0] * num_dropped, 0)[2]


@pytest.mark.parametrize(
    ("num_keep", "kept", "left", "true_average"),
    [
        (192, (300, 200, 110), [309, 204, 113], 206.5),
        (128, (303, 110, 36), [312, 117, 39], 145.40625),
        (64, (66, 30, 17), [82, 32, 18], 82.25),
    ],
)
def test_published_settings(num_keep, kept, left, true_average):
    setting = f"paper-{num_keep}"
    assert counts(setting=setting) == left
    assert average(left) == true_average
    before = 576
    pruner = ocvtp.build_pruner("sparsevlm", setting=setting)
    for layer, expected, total in zip(LAYERS, kept, left, strict=True):
        selection = pruner.select_at(
            scored(torch.randn(1, before, 2), torch.rand(1, before), layer), layer, total
        )
        alone = (selection.merge[0] != 0).sum(dim=1) == 1
        assert alone[:expected].all()
        assert selection.keep_indices.shape[1] - expected == _clusters(before - expected)
        before = total


@pytest.mark.parametrize(
    ("num_keep", "left", "true_average"),
    [
        (192, [300, 200, 118], 206.75),
        (128, [238, 108, 60], 144.125),
        (64, [66, 34, 20], 81.8125),
    ],
)
def test_published_settings_of_plus(num_keep, left, true_average):
    setting = f"plus-{num_keep}"
    assert counts(setting=setting) == left
    assert average(left) == true_average
    pruner = ocvtp.build_pruner("sparsevlm", setting=setting)
    assert pruner.positions == "original"
    scores = torch.rand(1, 576)
    selection = pruner.select_at(scored(torch.randn(1, 576, 2), scores, 3), 3, left[0])
    assert selection.merge is None
    assert selection.keep_indices[0].tolist() == sorted(naive.best(scores[0].tolist(), left[0]))


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(
    ("num_keep", "num_layers", "num_tokens"),
    [
        (64, 32, 576),
        (65, 32, 576),
        (128, 32, 576),
        (192, 32, 576),
        (100, 32, 576),
        (300, 32, 576),
        (192, 40, 576),
        (192, 28, 576),
        (640, 32, 2880),
        (575, 32, 576),
    ],
)
def test_a_budget_is_the_average(num_keep, num_layers, num_tokens, plus):
    left = counts(num_layers, num_tokens, num_keep=num_keep, plus=plus)
    assert average(left, num_layers, num_tokens) == pytest.approx(num_keep, abs=0.5)
    assert num_tokens >= left[0] >= left[1] >= left[2]
    assert left == counts(num_layers, num_tokens, keep_ratio=num_keep / num_tokens, plus=plus)


def test_keeping_all_keeps_all():
    assert counts(num_keep=576) == [576] * 3
    assert counts(num_keep=9999, num_tokens=300) == [300] * 3


def test_stages_are_what_is_left():
    pruner = ocvtp.build_pruner("sparsevlm", stages=((2, 0.5), (4, 40)))
    assert pruner.schedule(8, 100) == (LayerStage(2, 50), LayerStage(4, 40))


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="layers 3, 7, 16, but the language model has 16"):
        ocvtp.build_pruner("sparsevlm", num_keep=64).layers(16)
    with pytest.raises(ValueError, match="first 3 of 32 layers read all 576.*num_keep=55 or more"):
        counts(num_keep=20)
    with pytest.raises(ValueError, match="pass exactly one"):
        ocvtp.build_pruner("sparsevlm")
