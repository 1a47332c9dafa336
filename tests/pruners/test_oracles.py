"""Each method against a naive loop, one image and one token at a time, written from the papers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_contract import image, make_tokens
from torch.nn.functional import adaptive_avg_pool2d, normalize
from torch.testing import assert_close

import ocvtp
from ocvtp.ops.diversity import dpp_map
from ocvtp.ops.merging import contextual_share, kept_and_rest
from ocvtp.ops.selection import count_outliers, spaced
from ocvtp.ops.similarity import unit
from ocvtp.structures import VisualTokens

GRID = (5, 7)  # 35 tokens: odd
COUNT = 35


def made(name, seed, grid_hw=GRID, **settings):
    """A pruner and three random images."""
    pruner = ocvtp.build_pruner(name, **settings)
    return pruner, make_tokens(pruner.needs, 3, grid_hw, seed=seed)


def cosines(x):
    x = normalize(x.double(), dim=-1)
    return x @ x.T


def by_score(scores):
    return sorted(range(len(scores)), key=lambda i: -float(scores[i]))


def farthest(cosine, chosen, num, reduce):
    """Add the token with the least `reduce` of its cosines to the chosen ones, up to num."""
    chosen = list(chosen)
    while len(chosen) < num:
        rest = [i for i in range(len(cosine)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: float(reduce(cosine[i, chosen]))))  # noqa: B023
    return chosen


def check_all(pruner, tokens, oracle):
    kept = pruner.select(tokens).keep_indices.tolist()
    for b, row in enumerate(kept):
        assert row == sorted(oracle(image(tokens, b))), f"image {b}"


@pytest.mark.parametrize("num_keep", [1, 2, 10, 34])
@pytest.mark.parametrize("seed", range(3))
def test_divprune(num_keep, seed):
    pruner, tokens = made("divprune", seed, num_keep=num_keep)

    def oracle(t):
        cosine = cosines(t.projected[0])
        nearest = (cosine - 2 * torch.eye(COUNT)).amax(dim=1)
        return farthest(cosine, [int(nearest.argmin())], num_keep, torch.amax)

    check_all(pruner, tokens, oracle)


@pytest.mark.parametrize("seed", range(3))
def test_todre(seed):
    pruner, tokens = made("todre", seed, num_keep=9)

    def oracle(t):
        pivot = int(t.attention[-1, "cls"][0].argmax())
        return farthest(cosines(t.projected[0]), [pivot], 9, torch.sum)

    check_all(pruner, tokens, oracle)


@pytest.mark.parametrize(("num_keep", "core_ratio"), [(1, 0.6), (9, 0.6), (9, 0.0), (9, 1.0)])
def test_zspaprune(num_keep, core_ratio):
    pruner, tokens = made("zspaprune", 0, num_keep=num_keep, core_ratio=core_ratio)

    def oracle(t):
        words = t.text[0][t.text_valid[0]].mean(dim=0)
        close = normalize(t.projected[0], dim=-1) @ normalize(words, dim=0)
        core = by_score(close)[: max(1, int(core_ratio * num_keep))]
        return farthest(cosines(t.projected[0]), core, num_keep, torch.amax)

    check_all(pruner, tokens, oracle)


@pytest.mark.parametrize(("num_keep", "first_ratio"), [(9, 0.8), (30, 0.8), (9, 0.3)])
def test_trimtokenator(num_keep, first_ratio):
    pruner, tokens = made("trimtokenator", 0, num_keep=num_keep, first_ratio=first_ratio)

    def oracle(t):
        visual, words = t.projected[0].double(), t.text[0][t.text_valid[0]].double()
        distance = (visual[:, None] - words[None]).square().sum(dim=2).mean(dim=1)
        stay = by_score(-distance)[: max(num_keep, int(first_ratio * COUNT))]
        cosine = cosines(visual[stay])
        chosen = farthest(cosine, [int(cosine.mean(dim=1).argmin())], num_keep, torch.mean)
        return [stay[i] for i in chosen]

    check_all(pruner, tokens, oracle)


@pytest.mark.parametrize("tau", [-0.5, 0.1, 0.5, 0.9])
def test_greedyprune(tau):
    pruner, tokens = made("greedyprune", 0, num_keep=12, tau=tau)

    def oracle(t):
        word = t.text[0][t.text_valid[0]][-1]
        order = by_score(normalize(t.projected[0], dim=-1) @ normalize(word, dim=0))
        cosine, kept = cosines(t.projected[0]), []
        for i in order:
            if len(kept) < 12 and all(cosine[i, j] <= tau for j in kept):
                kept.append(i)
        return kept + [i for i in order if i not in kept][: 12 - len(kept)]

    check_all(pruner, tokens, oracle)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_scope(alpha):
    pruner, tokens = made("scope", 0, num_keep=12, alpha=alpha)

    def oracle(t):
        cosine, saliency = cosines(t.features[0]), t.attention[-2, "cls"][0].double() ** alpha
        covered, kept = torch.zeros(COUNT, dtype=torch.float64), []
        for _ in range(12):
            gains = [
                -1.0 if i in kept else float((cosine[i] - covered).clamp(min=0).sum() * saliency[i])
                for i in range(COUNT)
            ]
            kept.append(by_score(gains)[0])
            covered = torch.maximum(covered, cosine[kept[-1]])
        return kept

    check_all(pruner, tokens, oracle)


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("num_keep", [1, 7, 12])
def test_cdpruner(num_keep, parts, nearest):
    """The official code's steps on the full kernel, relevance scaled per image."""
    pruner, tokens = made("cdpruner", 0, num_keep=num_keep, nearest=nearest)
    tokens = tokens.map(lambda t: t.double() if t.is_floating_point() else t)
    tokens.clip_text_valid[:] = torch.arange(2) < parts
    kept = pruner.select(tokens).keep_indices.tolist()
    for b in range(3):
        visual = normalize(tokens.clip_visual[b], dim=-1)
        text = normalize(tokens.clip_text[b, :parts], dim=-1)
        related = (visual @ text.T).mean(dim=1) * (1 if nearest else -1)
        related = (related - related.min() + 1e-6) / (related.max() - related.min())
        kernel = related[:, None] * cosines(tokens.projected[b]) * related[None]
        gain, basis, chosen = kernel.diagonal().clone(), [], []
        for _ in range(min(num_keep, 8)):  # the rank
            j = int(gain.argmax())
            explained = sum((e[j] * e for e in basis), torch.zeros(COUNT, dtype=torch.float64))
            basis.append((kernel[j] - explained) / gain[j].sqrt())
            gain = gain - basis[-1] ** 2
            gain[j] = -math.inf
            chosen.append(j)
        assert set(chosen) <= set(kept[b])
        # Beyond the rank of the kernel, by relevance.
        rest = [i for i in by_score(related) if i not in chosen]
        assert kept[b] == sorted(chosen + rest[: num_keep - len(chosen)])


def test_dpp_map_takes_the_largest_determinant_step_by_step():
    torch.manual_seed(0)
    directions = unit(torch.randn(1, 12, 20, dtype=torch.float64))
    quality = torch.rand(1, 12, dtype=torch.float64) + 0.1
    kernel = quality[0, :, None] * (directions[0] @ directions[0].T) * quality[0]
    chosen = []
    for pick in dpp_map(directions, quality, 6, None)[0].tolist():
        volumes = {
            i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))
            for i in range(12)
            if i not in chosen
        }
        assert pick == max(volumes, key=volumes.__getitem__)
        chosen.append(pick)


@pytest.mark.parametrize(
    ("num_keep", "ratio", "step"),
    [(9, 0.5, 8), (10, 0.5, 8), (9, 0.0, 8), (1, 0.5, 8), (3, 0.7, 3), (33, 0.5, 8), (2, 0.5, 8)],
)
@pytest.mark.parametrize("grid_hw", [(5, 7), (4, 9)])
def test_vispruner(num_keep, ratio, step, grid_hw):
    settings = {"num_keep": num_keep, "important_ratio": ratio, "step": step}
    pruner, tokens = made("vispruner", 0, grid_hw, **settings)

    def oracle(t):
        order = by_score(t.attention[-2, "cls"][0])
        important = int(num_keep * ratio)
        kept, rest = order[:important], order[important:]
        cosine, target = cosines(t.features[0]), num_keep - important
        while len(rest) > target:
            a, b = rest[::2], rest[1::2]
            gone = min(step, len(rest) - target, len(a))
            a = sorted(a, key=lambda i: -max(float(cosine[i, j]) for j in b))  # noqa: B023
            rest = a[gone:] + b
        return kept + rest

    check_all(pruner, tokens, oracle)


@pytest.mark.parametrize("crops", [1, 4, 16])
@pytest.mark.parametrize("num_keep", [1, 8, 20, 33])
@pytest.mark.parametrize("grid_hw", [GRID, (4, 8), (7, 11), (1, 13)])  # no, all and 13 crops even
@pytest.mark.parametrize("ragged", [False, True])
def test_holov(num_keep, crops, grid_hw, ragged):
    num_keep = min(num_keep, grid_hw[0] * grid_hw[1])
    pruner = ocvtp.build_pruner("holov", num_keep=num_keep, num_crops=crops)
    tokens = make_tokens(pruner.needs, 3, grid_hw, seed=1, ragged=ragged)

    def oracle(t):
        attention = t.attention[-2, "cls"][0][t.real[0]].double()
        count, kept, members = len(attention), [], []
        for c in range(crops):
            start = sum(map(len, members))
            members.append(range(start, start + count // crops + (c < count % crops)))
        means = [float(attention[list(m)].mean()) if m else 0.0 for m in members]
        quota = [int(mean / sum(means) * num_keep + 1e-6) for mean in means]
        for c in by_score(means)[: num_keep - sum(quota)]:
            quota[c] += 1
        for m, q in zip(members, quota, strict=True):
            kept += sorted(m, key=lambda i: -attention[i])[:q]
        rest = [i for i in by_score(attention) if i not in kept]
        return kept + rest[: num_keep - len(kept)]

    selection = pruner.select(tokens)
    for b, row in enumerate(selection.keep_indices):
        row = row if selection.valid is None else row[selection.valid[b]]
        assert row.tolist() == sorted(oracle(image(tokens, b))), f"image {b}"


@pytest.mark.parametrize("num_keep", [1, 7, 10, 20, 34])
@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_fopru(num_keep, strategy):
    pruner, tokens = made("fopru", 0, num_keep=num_keep, strategy=strategy)
    picked = set()

    def oracle(t):
        given, received = t.attention[-2, "given"][0], t.attention[-2, "received"][0]
        picked.add(bool(given.var() > received.var()))
        significance = given if given.var() > received.var() else received
        if strategy == "rank":
            return by_score(significance)[:num_keep]
        kept = []
        for row in by_score(significance.view(GRID).sum(dim=1)):
            best = sorted(range(row * 7, row * 7 + 7), key=lambda i: -float(significance[i]))
            kept += best[: num_keep - len(kept)]
        return kept

    check_all(pruner, tokens, oracle)
    assert picked == {True, False}


@pytest.mark.parametrize(
    ("name", "settings"), [("fopru", {"strategy": "row"}), ("pool", {}), ("hiprune", {"alpha": 1})]
)
def test_what_reads_the_grid_refuses_tokens_without_one(name, settings):
    pruner, tokens = made(name, 0, num_keep=5, **settings)
    with pytest.raises(ValueError, match=f"'{name}' reads the grid .* 35 tokens are no 5 x 5"):
        pruner.select(replace(tokens, grid_hw=(5, 5)))


@pytest.mark.parametrize(("num_keep", "alpha"), [(4, 0.1), (20, 0.5), (10, 1.0), (34, 1.0)])
def test_hiprune(num_keep, alpha):
    pruner, tokens = made("hiprune", 0, num_keep=num_keep, alpha=alpha)

    def oracle(t):
        middle, deep = t.attention[8, "received"][0], t.attention[-2, "received"][0]
        around = set()
        for anchor in by_score(middle)[: round(num_keep * alpha / 5)]:
            around |= {min(max(anchor + s, 0), COUNT - 1) for s in (0, -1, 1, -7, 7)}
        return sorted(range(COUNT), key=lambda i: (i not in around, -float(deep[i])))[:num_keep]

    check_all(pruner, tokens, oracle)


def zipped(scores, metric, features, dominant, contextual):
    """VisionZip's two parts: dominant tokens and merged ones."""
    best = sorted(by_score(scores)[:dominant])
    rest = [i for i in range(len(scores)) if i not in best]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::step][:contextual]
    joined = {target: [] for target in targets}
    for i in rest:
        if i not in targets and contextual:
            near = [
                float(normalize(metric[i], dim=0) @ normalize(metric[t], dim=0)) for t in targets
            ]
            joined[targets[near.index(max(near))]].append(i)
    rows = [features[i] for i in best]
    for target, members in joined.items():
        mean = features[members].mean(dim=0) if members else 0 * features[target]
        rows.append(features[target] + mean)
    return rows


@pytest.mark.parametrize("num_keep", [1, 2, 9, 20, 34, 35])
@pytest.mark.parametrize("name", ["visionzip", "visiondrop"])
def test_dominant_and_contextual(name, num_keep):
    pruner, tokens = made(name, 0, num_keep=num_keep)
    with_cls = name == "visionzip"
    share = 10 / 64 if with_cls else 6 / 48
    contextual = min(round(num_keep * share), num_keep - with_cls)
    merge = pruner.select(tokens).merge
    for b in range(3):
        scores = tokens.attention[-2, "cls" if with_cls else "received"][b]
        metric = tokens.keys[-2][b].unflatten(1, (2, -1)).mean(dim=1)
        rows = [tokens.cls[b]] if with_cls else []
        rows += zipped(
            scores, metric, tokens.features[b], num_keep - contextual - with_cls, contextual
        )
        cls = tokens.cls[b] if with_cls else torch.zeros(8)
        assert_close(merge[b] @ torch.cat([cls[None], tokens.features[b]]), torch.stack(rows))


@pytest.mark.parametrize("total", [192, 128, 64])
def test_visionzip_splits_as_published(total):
    assert contextual_share(None, 10 / 64, total, total - 1) == {192: 30, 128: 20, 64: 10}[total]


def merged_by_hand(attention, keys, features, kept, neighbours):
    """PruMerge's rows for kept tokens, and the one for the others."""
    rows = []
    for i in kept:
        others = [j for j in range(len(keys)) if j != i]
        cosine = {j: float(normalize(keys[i], dim=0) @ normalize(keys[j], dim=0)) for j in others}
        near = sorted(others, key=lambda j: -cosine[j])[:neighbours]  # noqa: B023
        rows.append(features[i] + sum(attention[j] * features[j] for j in near))
    rest = [j for j in range(len(keys)) if j not in kept]
    rows.append(sum((attention[j] * features[j] for j in rest), 0 * features[0]))
    return torch.stack(rows)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("seed", range(3))
def test_prumerge(name, adaptive, seed):
    settings = {"adaptive": True} if adaptive else {"num_keep": 10}
    pruner, tokens = made(name, seed, num_neighbours=5, **settings)
    selection = pruner.select(tokens)
    for b in range(3):
        keys = torch.cat([tokens.cls_keys[-1][b : b + 1], tokens.keys[-1][b]])
        attention = (keys @ tokens.cls_queries[-1][b] * 8**-0.5).softmax(dim=0)[1:]
        order = by_score(attention)
        if adaptive:
            q1, q3 = np.percentile(attention.numpy(), [25, 75])
            ratio = int((attention.numpy() > q3 + 1.5 * (q3 - q1)).sum()) / COUNT
            ratio = ratio or 1 / COUNT  # where the official code fails
            kept = order[: round(COUNT * ratio)]
            if name == "prumerge_plus":
                step = max(1, int(int(1 / ratio + 1e-9) / 3))
                kept += [i for i in range(0, COUNT - 1, step) if i not in kept]
        elif name == "prumerge":
            kept = order[:9]
        else:  # ours: a quarter by attention, the others at equal steps
            kept = order[:2]
            rest = [i for i in range(COUNT) if i not in kept]
            kept += [rest[int((i + 0.5) * len(rest) / 7)] for i in range(7)]
        wanted = merged_by_hand(attention, tokens.keys[-1][b], tokens.features[b], kept, 5)
        real = selection.counts()[b]
        assert real == len(wanted)
        assert_close(selection.merge[b, :real, 1:] @ tokens.features[b], wanted)


@pytest.mark.parametrize(("grid_hw", "num_keep", "shape"), [
    ((24, 24), 64, (8, 8)), ((24, 24), 576, (24, 24)), ((24, 24), 1, (1, 1)),
    ((24, 24), 144, (12, 12)), ((5, 7), 35, (5, 7)), ((6, 3), 8, (4, 2)), ((2, 18), 9, (1, 9)),
])  # fmt: skip
def test_pool_is_adaptive_average_pooling(grid_hw, num_keep, shape):
    pruner, tokens = made("pool", 0, grid_hw, num_keep=num_keep)
    image_like = tokens.features.transpose(1, 2).unflatten(2, grid_hw)
    wanted = adaptive_avg_pool2d(image_like, shape).flatten(2).transpose(1, 2)
    assert_close(pruner.select(tokens).merge[:, :, 1:] @ tokens.features, wanted)


def test_pool_reads_the_part_of_the_grid_that_an_image_fills():
    """Beside others, and where both edges are padding, as in a tile that was unpadded."""
    height, width = 6, 5
    parts = [(0, 6, 0, 5), (0, 4, 0, 5), (1, 5, 0, 5), (0, 6, 1, 4)]
    there = torch.zeros(len(parts), height, width, dtype=torch.bool)
    for number, (top, bottom, left, right) in enumerate(parts):
        there[number, top:bottom, left:right] = True
    tokens = VisualTokens(torch.randn(len(parts), 30, 3), (height, width), there.flatten(1))
    for num_keep in (1, 4, 7, 12, 18):
        pruner = ocvtp.build_pruner("pool", num_keep=num_keep)
        found = pruner.select(tokens)
        read = found.merge[:, :, 1:] @ tokens.features
        for number, (top, bottom, left, right) in enumerate(parts):
            real = there[number].flatten()
            grid = (bottom - top, right - left)
            alone = VisualTokens(tokens.features[number : number + 1, real], grid)
            wanted = pruner.select(alone)
            assert_close(read[number], (wanted.merge[:, :, 1:] @ alone.features)[0])
            kept = real.nonzero()[:, 0][wanted.keep_indices[0]]
            assert found.keep_indices[number].tolist() == kept.tolist()


@pytest.mark.parametrize("num_keep", range(1, 36))
def test_pool_covers_the_image_for_every_budget(num_keep):
    pruner, tokens = made("pool", 0, num_keep=num_keep)
    merge = pruner.select(tokens).merge[0, :, 1:]
    assert merge.shape == (num_keep, COUNT)
    assert (merge > 0).any(dim=0).all(), "a token is in no cell"
    assert_close(merge.sum(dim=1), torch.ones(num_keep))


@pytest.mark.parametrize("space", ["features", "projected"])
def test_fps(space):
    pruner, tokens = made("fps", 0, num_keep=9, space=space)

    def oracle(t):
        points = getattr(t, space)[0].double()
        chosen = [0]
        while len(chosen) < 9:
            nearest = torch.cdist(points, points[chosen]).amin(dim=1)
            chosen.append(int(nearest.argmax()))
        return chosen

    check_all(pruner, tokens, oracle)


def test_kmeans_keeps_one_token_of_every_cluster():
    torch.manual_seed(0)
    centres = 20 * torch.randn(6, 8)
    cluster = torch.arange(36) % 6  # equal steps of 6 would start in one cluster
    cluster = cluster[torch.randperm(36)]
    features = centres[cluster] + 0.1 * torch.randn(36, 8)
    tokens = VisualTokens(features[None], (6, 6))
    kept = ocvtp.build_pruner("kmeans", num_keep=18).select(tokens).keep_indices[0]
    assert set(cluster[kept].tolist()) == set(range(6))


@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_kmeans(iterations):
    pruner, tokens = made("kmeans", 0, num_keep=6, iterations=iterations)
    tokens.features[:, 2] += 8  # starts a cluster and stays alone in it

    def oracle(t):
        points = t.features[0].double()
        centres = points[[int((i + 0.5) * COUNT / 6) for i in range(6)]]
        for _ in range(iterations):
            near = torch.cdist(points, centres).argmin(dim=1)
            centres = torch.stack([points[near == k].mean(dim=0) for k in range(6)])
        distance = torch.cdist(points, centres)
        near = distance.argmin(dim=1)
        members = [[i for i in range(COUNT) if near[i] == k] for k in range(6)]
        return [min(m, key=lambda i: round(float(distance[i, near[i]]), 4)) for m in members]

    check_all(pruner, tokens, oracle)


def test_what_padding_holds_makes_no_tokens_of_kmeans_equal():
    pruner, tokens = made("kmeans", 0, num_keep=6)
    valid = torch.ones(3, COUNT, dtype=torch.bool)
    valid[:, -4:] = False
    tokens = replace(tokens, valid=valid)
    kept = pruner.select(tokens).keep_indices
    tokens.features[~valid] = 1e5
    assert pruner.select(tokens).keep_indices.equal(kept)


@pytest.mark.parametrize("count", [2, 3, 10, 35, 64])
def test_outliers_are_those_of_numpy(count):
    torch.manual_seed(count)
    scores = torch.randn(4, count).exp().exp()
    valid = torch.arange(count) < torch.tensor([count, count, max(1, count // 2), 1])[:, None]
    for mask in (None, valid):
        for b, found in enumerate(count_outliers(scores, mask).flatten().tolist()):
            row = scores[b].numpy() if mask is None else scores[b][mask[b]].numpy()
            q1, q3 = np.percentile(row, [25, 75])
            assert found == (row > q3 + 1.5 * (q3 - q1)).sum()
            assert found <= count // 4 + 1


def test_spaced():
    candidates = torch.tensor([[True] * 8, [False, True] * 4, [False] * 7 + [True]])
    picks, real = spaced(candidates, 3)
    assert picks[0].tolist() == [1, 4, 6]
    assert picks[1].tolist() == [1, 5, 7]
    assert real.tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    assert picks[2, 0] == 7


def test_kept_and_rest():
    order = torch.tensor([[2, 0, 1, 3]])
    merge = kept_and_rest(order, torch.tensor([[2]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]]), 4)
    wanted = [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0.2, 0, 0.4], [0, 0, 0, 0, 0]]
    assert_close(merge[0], torch.tensor(wanted))


def test_merge_rows_in_raster_order():
    """The rows of a merging method follow the paper; in raster order they follow `keep_indices`."""
    pruner, tokens = made("prumerge", 0, num_keep=6)
    selection = pruner.select(tokens)
    raster = selection.in_raster_order()
    assert raster.anchors is None
    for b in range(3):
        for k, token in enumerate(selection.anchors[b].tolist()):
            place = selection.keep_indices[b].tolist().index(token)
            assert_close(raster.merge[b, place], selection.merge[b, k])
    adaptive = ocvtp.build_pruner("prumerge").select(tokens)
    ordered = adaptive.in_raster_order()
    assert (ordered.merge != 0).any(dim=2).equal(adaptive.valid)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fopru", {"strategy": "best"}, "strategy='best'; pass 'rank' or 'row'"),
        ("visionzip", {"guidance": "given"}, "guidance='given'; pass 'cls' or 'received'"),
        ("hiprune", {"alpha": 2}, "alpha=2; pass a share"),
        ("vispruner", {"important_ratio": -1}, "important_ratio=-1"),
        ("vispruner", {"step": 0}, "step=0"),
        ("zspaprune", {"core_ratio": 1.5}, "core_ratio=1.5"),
        ("trimtokenator", {"first_ratio": -0.1}, "first_ratio=-0.1"),
        ("fps", {"space": "pixels"}, "space='pixels'"),
        ("kmeans", {"iterations": -1}, "iterations=-1"),
        ("holov", {"num_crops": 0}, "num_crops=0; pass at least 1"),
        ("prumerge", {"num_neighbours": 0}, "num_neighbours=0; pass at least 1"),
        ("greedyprune", {"tau": 2}, "tau=2; pass a cosine"),
    ],
)
def test_settings_out_of_range(name, settings, message):
    with pytest.raises(ValueError, match=message):
        ocvtp.build_pruner(name, num_keep=4, **settings)


@pytest.mark.parametrize(("name", "most"), [("visionzip", 3), ("visiondrop", 4)])
def test_more_contextual_tokens_than_the_budget_holds(name, most):
    pruner, tokens = made(name, 0, num_keep=4, num_contextual=5)
    with pytest.raises(ValueError, match=f"num_contextual=5 of num_keep=4; pass 0 to {most}"):
        pruner.select(tokens)
