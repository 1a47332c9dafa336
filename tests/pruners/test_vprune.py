"""V-PRUNE against plain loops, and on images whose answer is known."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch.testing import assert_close

import ocvtp
from ocvtp.ops.patch_colours import chi_square, cosine, histograms, sparing_order
from ocvtp.structures import VisualTokens

SIDE = 4  # pixels of a patch


def patches(grid_hw, batch=1, seed=0, flat=0.5):
    """Random patches, a share of which are of one of few colours, nearly."""
    random = torch.Generator().manual_seed(seed)
    count = grid_hw[0] * grid_hw[1]
    noise = torch.randint(0, 256, (batch, count, 3 * SIDE**2), generator=random).float()
    colours = torch.tensor([[250.0, 30, 10], [10, 200, 30], [90, 90, 90]])
    which = torch.randint(0, 3, (batch, count), generator=random)
    plain = colours[which].repeat_interleave(SIDE**2, dim=2)
    plain = plain + torch.randint(0, 6, noise.shape, generator=random)
    is_flat = torch.rand(batch, count, 1, generator=random) < flat
    return VisualTokens(torch.where(is_flat, plain, noise), grid_hw)


def histogram(patch, bins=16):
    found = torch.zeros(3, bins)
    for colour, values in enumerate(patch.view(3, -1)):
        for value in values:
            found[colour, min(int(value * bins / 256), bins - 1)] += 1
    return found.flatten()


def distance(a, b):
    total = 0.0
    for x, y in zip(histogram(a).tolist(), histogram(b).tolist(), strict=True):
        total += 0.5 * (x - y) ** 2 / (x + y) if x + y else 0.0
    return total


def group_of(number, width):
    return number // width // 2, number % width // 2


def naive_adaptive(image, grid_hw, tau_chi=5.0, tau_cos=0.95):
    kept = []
    for number, patch in enumerate(image):
        alike = (
            distance(patch, image[other]) <= tau_chi
            and float(torch.cosine_similarity(patch, image[other], dim=0)) >= tau_cos
            for other in kept
            if group_of(other, grid_hw[1]) == group_of(number, grid_hw[1])
        )
        if not any(alike):
            kept.append(number)
    return kept


def naive_order(image, grid_hw):
    """Patches in the order in which they go, and the one that stays."""
    height, width = grid_hw
    level = {(n // width, n % width): n for n in range(height * width)}
    order = []
    while len(level) > 1:
        events, representatives = [], {}
        cells = sorted({(row // 2, column // 2) for row, column in level})
        for cell in cells:
            left = sorted(n for (y, x), n in level.items() if (y // 2, x // 2) == cell)
            while len(left) > 1:
                cost, a, b = min((distance(image[a], image[b]), a, b) for a, b in pairs(left))
                events.append((cost, b))
                left.remove(b)
            representatives[cell] = left[0]
        order += [number for _, number in sorted(events, key=lambda event: event[0])]
        level = representatives
    return order + list(level.values())


def pairs(numbers):
    return list(combinations(numbers, 2))


@pytest.mark.parametrize("grid_hw", [(4, 4), (3, 5), (6, 2)])
def test_adaptive_is_the_naive_one(grid_hw):
    tokens = patches(grid_hw, batch=3, seed=2, flat=0.9)
    selection = ocvtp.build_pruner("vprune").select(tokens)
    counts = selection.counts().tolist()
    assert min(counts) < grid_hw[0] * grid_hw[1]
    for image in range(3):
        kept = selection.keep_indices[image][selection.valid[image]].tolist()
        assert kept == naive_adaptive(tokens.features[image], grid_hw)


@pytest.mark.parametrize("grid_hw", [(4, 4), (3, 5), (7, 2)])
def test_exact_drops_the_closest_pairs_first(grid_hw):
    tokens = patches(grid_hw, batch=2, seed=1, flat=0.3)
    order = [naive_order(image, grid_hw) for image in tokens.features]
    for num_keep in range(1, grid_hw[0] * grid_hw[1] + 1):
        kept = ocvtp.build_pruner("vprune", num_keep=num_keep).select(tokens).keep_indices
        for image in range(2):
            costs = len(order[image]) - num_keep
            assert set(kept[image].tolist()) == set(order[image][costs:])


def test_a_group_keeps_one_down_to_a_quarter():
    tokens = patches((8, 8), batch=2, flat=0.9)
    kept = ocvtp.build_pruner("vprune", num_keep=16).select(tokens).keep_indices
    for image in kept.tolist():
        assert len({group_of(number, 8) for number in image}) == 16


@pytest.mark.parametrize("value", [0.0, 128.0, 255.0])
def test_a_flat_image_keeps_one_patch_of_each_group(value):
    tokens = VisualTokens(torch.full((1, 35, 3 * SIDE**2), value), (5, 7))
    selection = ocvtp.build_pruner("vprune").select(tokens)
    first_of_groups = [row * 7 + column for row in (0, 2, 4) for column in (0, 2, 4, 6)]
    assert selection.keep_indices[0][selection.valid[0]].tolist() == first_of_groups


def test_padding_stands_for_nobody():
    flat, valid = torch.zeros(1, 4, 48), torch.tensor([[False, True, True, True]])
    selection = ocvtp.build_pruner("vprune").select(VisualTokens(flat, (2, 2), valid=valid))
    assert selection.keep_indices[0][selection.valid[0]].tolist() == [1]


def test_noise_keeps_all():
    noise = torch.randint(0, 256, (1, 36, 3 * 14**2), generator=torch.Generator().manual_seed(0))
    selection = ocvtp.build_pruner("vprune").select(VisualTokens(noise.float(), (6, 6)))
    assert selection.counts().tolist() == [36]


def test_both_thresholds_count():
    """Close histograms of other pixels, and the same hue at another brightness, both stay."""
    ramp = torch.arange(48.0) * 5
    turned = ramp.view(3, 16).flip(1).flatten()
    bright = torch.full((48,), 60.0)
    tokens = VisualTokens(torch.stack([ramp, turned, bright, 2 * bright])[None], (2, 2))
    colours = histograms(tokens.features, 16)
    assert chi_square(colours)[0, 0, 1] == 0
    assert cosine(tokens.features)[0, 0, 1] < 0.95
    assert_close(cosine(tokens.features)[0, 2, 3], torch.tensor(1.0))
    assert chi_square(colours)[0, 2, 3] > 5
    assert ocvtp.build_pruner("vprune").select(tokens).counts().tolist() == [4]
    loose = ocvtp.build_pruner("vprune", tau_cos=-1.0).select(tokens)
    assert loose.keep_indices[0][loose.valid[0]].tolist() == [0, 2, 3]
    loose = ocvtp.build_pruner("vprune", tau_chi=1e6).select(tokens)
    assert loose.keep_indices[0][loose.valid[0]].tolist() == [0, 1, 2]


def test_a_cap_takes_the_last_to_be_spared():
    tokens = patches((4, 4), flat=0.3)
    every = ocvtp.build_pruner("vprune").select(tokens)
    count = int(every.counts())
    capped = ocvtp.build_pruner("vprune", num_keep=count - 2, adaptive=True).select(tokens)
    kept = set(every.keep_indices[0][every.valid[0]].tolist())
    stays = sparing_order(histograms(tokens.features, 16), (4, 4), 2, None)[0]
    best = sorted(kept, key=lambda number: -float(stays[number]))[: count - 2]
    assert capped.keep_indices[0][capped.valid[0]].tolist() == sorted(best)


def test_histograms_count_every_value():
    tokens = patches((2, 2))
    found = histograms(tokens.features, 16)[0]
    for patch, row in zip(tokens.features[0], found, strict=True):
        assert row.equal(histogram(patch))
    edge = histograms(torch.tensor([[[255.9, 256.0, -1.0]]]), 16)[0, 0]
    assert edge.view(3, 16).argmax(dim=1).tolist() == [15, 15, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bins": 0}, "pass 1 to 256"),
        ({"group_side": 1}, "at least 2 patches"),
        ({"tau_chi": -1.0}, "a distance from 0 on"),
        ({"tau_cos": 1.5}, "a cosine of -1 to 1"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ocvtp.build_pruner("vprune", **settings)


def test_tokens_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match="reads the grid"):
        ocvtp.build_pruner("vprune").select(VisualTokens(torch.zeros(1, 5, 12), (2, 3)))
