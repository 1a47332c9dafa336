"""Greedy covering, and how alike two tokens are, against loops from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ocvtp.ops.cover import greedy_cover, likeness
from ocvtp.ops.ridge import greedy_ridge
from ocvtp.ops.similarity import unit
from ocvtp.slots.statistics import standardized

GRID = (3, 4)
COUNT, WIDTH, PENALTY = 12, 5, 0.3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(seed=0, batch=3, valid=None):
    """Likeness, weights and targets, in float64."""
    targets = standardized(draw(batch, COUNT, WIDTH, seed=seed), valid)
    logits = 2 * draw(batch, COUNT, seed=seed + 50)
    if valid is not None:
        logits = logits.masked_fill(~valid, float("-inf"))
    return likeness(unit(targets), GRID, 1.5, 1 / 3), logits.softmax(dim=1), targets


def restored_by_hand(targets, taken):
    """What each token would restore of what these leave: R is deflated, all tokens weigh alike."""
    floor = PENALTY * sum(float(y @ y) for y in targets) / len(targets)
    rest = targets.clone()
    for pick in taken:
        v = rest[pick].clone()
        rest = rest - (rest @ v)[:, None] * v / (float(v @ v) + floor)
    gains = []
    for v in rest:
        shared = sum(float(r @ v) ** 2 for r in rest) / len(rest)
        gains.append(shared / (float(v @ v) + floor))
    return gains


def covered_by_hand(alike, weights, taken):
    """What each token would cover more than these do."""
    gains = []
    for s in range(len(weights)):
        gain = 0.0
        for m in range(len(weights)):
            before = max([float(alike[t, m]) for t in taken], default=0.0)
            gain += float(weights[m]) * max(float(alike[s, m]) - before, 0.0)
        gains.append(gain)
    return gains


def by_hand(alike, weights, targets, num, balance):
    """Picks of one image without padding, step by step."""
    taken = []
    for _ in range(num):
        cover, restore = covered_by_hand(alike, weights, taken), restored_by_hand(targets, taken)
        score = [
            (1 - balance) * c / (sum(cover) or 1) + balance * r / (sum(restore) or 1)
            for c, r in zip(cover, restore, strict=True)
        ]
        left = [s for s in range(len(weights)) if s not in taken]
        taken.append(max(left, key=lambda s: score[s]))
    return taken


# ---------------------------------------------------------------- covering


@pytest.mark.parametrize("balance", [0.0, 0.5, 0.9])
def test_picks_are_those_of_loops(balance):
    alike, weights, targets = make()
    picks = greedy_cover(alike, weights, targets, 5, balance, PENALTY)
    for b in range(3):
        wanted = by_hand(alike[b], weights[b], targets[b], 5, balance)
        assert picks[b].tolist() == wanted


def test_restoring_alone_is_greedy_ridge_with_even_weights():
    alike, weights, targets = make(seed=1)
    even = torch.full_like(weights, 1 / COUNT)
    picks = greedy_cover(alike, weights, targets, 4, 1.0, PENALTY)
    assert picks.equal(greedy_ridge(targets, even, 4, PENALTY))


def test_both_sides_of_the_balance_count():
    alike, weights, targets = make(batch=8, seed=2)
    picks = [greedy_cover(alike, weights, targets, 4, balance) for balance in (0.0, 0.5, 1.0)]
    assert not picks[0].equal(picks[1])
    assert not picks[1].equal(picks[2])


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_padding_is_taken_last_and_changes_nothing(balance):
    """Holes in the middle of the grid, as tiles have them."""
    valid = torch.ones(3, COUNT, dtype=torch.bool)
    valid[1, 8:] = False
    valid[2, [1, 2, 7]] = False
    alike, weights, targets = make(seed=3, valid=valid)
    picks = greedy_cover(alike, weights, targets, COUNT, balance, PENALTY, valid)
    for b in range(3):
        assert sorted(picks[b].tolist()) == list(range(COUNT))
        real = valid[b].nonzero()[:, 0]
        own = (alike[b][real][:, real], weights[b, real], targets[b, real])
        wanted = real[torch.tensor(by_hand(*own, 5, balance))]
        assert picks[b, :5].equal(wanted)
        assert set(picks[b, : len(real)].tolist()) == set(real.tolist())


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_picks_are_unique_where_nothing_is_left_to_gain(balance):
    """Blank images, and more picks than directions; ties go to the lower number."""
    blank = torch.zeros(2, COUNT, WIDTH)
    weights = torch.full((2, COUNT), 1 / COUNT)
    picks = greedy_cover(torch.zeros(2, COUNT, COUNT), weights, blank, COUNT, balance)
    assert picks.tolist() == [list(range(COUNT))] * 2
    same = torch.ones(2, COUNT, WIDTH)
    picks = greedy_cover(torch.ones(2, COUNT, COUNT), weights, same, COUNT, balance)
    assert picks.sort(dim=1).values.tolist() == [list(range(COUNT))] * 2


# ---------------------------------------------------------------- likeness


@pytest.mark.parametrize(("power", "spread"), [(1.5, 1 / 3), (1.0, 0.1)])
def test_likeness_is_the_cosine_and_the_distance_on_the_grid(power, spread):
    directions = unit(draw(2, COUNT, WIDTH, seed=4))
    found = likeness(directions, GRID, power, spread)
    for b in range(2):
        for n in range(COUNT):
            for m in range(COUNT):
                down, across = n // 4 - m // 4, n % 4 - m % 4
                cosine = max(float(directions[b, n] @ directions[b, m]), 0.0)
                near = math.exp(-(down**2 + across**2) / (2 * (spread * 4) ** 2))
                assert float(found[b, n, m]) == pytest.approx(cosine**power * near, abs=1e-12)
    assert_close(found, found.mT)


def test_the_longer_side_is_that_of_the_image():
    """Three rows of four, of which one image has two and another two columns."""
    directions = unit(draw(3, COUNT, WIDTH, seed=4)).float()
    longer = torch.tensor([[4], [4], [3]])
    found = likeness(directions, GRID, 1.5, 0.2, longer)
    for number, (image, grid) in enumerate([(slice(0, 12), GRID), (slice(0, 8), (2, 4))]):
        alone = likeness(directions[number : number + 1, image], grid, 1.5, 0.2)
        assert_close(found[number : number + 1, image, image], alone)
    narrow = torch.arange(COUNT).view(GRID)[:, :2].flatten()
    alone = likeness(directions[2:, narrow], (3, 2), 1.5, 0.2)
    assert_close(found[2:, narrow][:, :, narrow], alone)


def test_no_images_are_no_picks():
    assert greedy_cover(*(part[:0] for part in make()), 3, 0.5).shape == (0, 3)


def test_picks_have_no_gradient():
    alike, weights, targets = make()
    wanted = greedy_cover(alike, weights, targets, 3, 0.5)
    found = greedy_cover(alike.requires_grad_(), weights, targets.requires_grad_(), 3, 0.5)
    assert found.equal(wanted)
