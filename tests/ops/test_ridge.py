"""Ridge reconstruction and the slots' one-to-one choice, each against loops from their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ocvtp.ops.ridge import (
    greedy_ridge,
    ridge_error,
    ridge_step,
    straight_through,
    token_weights,
)
from ocvtp.slots.kept import cross_entropy
from ocvtp.slots.matching import (
    greedy_pairs,
    one_to_one,
    pairs_step,
    slot_choices,
    token_shares,
    tokens_of_slots,
)
from ocvtp.slots.statistics import FLOOR, FeatureStatistics, Moments, centred, standardized
from ocvtp.structures import VisualTokens, take

NUM_TOKENS, WIDTH = 13, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(seed=0, batch=3):
    """Centred tokens and weights that sum to 1."""
    targets = centred(draw(batch, NUM_TOKENS, WIDTH, seed=seed))
    return targets, draw(batch, NUM_TOKENS, seed=seed + 100).softmax(dim=1)


def padded(values, num, filling=0.0):
    return torch.cat([values, torch.full_like(values[:, :num], filling)], dim=1)


# ---------------------------------------------------------------- closed form


@pytest.mark.parametrize("num_keep", [1, 4, 9])
@pytest.mark.parametrize("penalty", [0.3, 1e-3])
def test_the_closed_form_is_each_tokens_own_ridge_regression(num_keep, penalty):
    """Token by token as least squares with the penalty as further rows, and e over the sum."""
    targets, weights = make()
    kept = draw(3, num_keep, WIDTH, seed=7)
    found = ridge_error(targets, kept, weights, penalty)
    for b in range(3):
        energy = sum(float(weights[b, n] * targets[b, n] @ targets[b, n]) for n in range(13))
        rows = torch.eye(num_keep, dtype=torch.float64) * (penalty * energy) ** 0.5
        matrix = torch.cat([kept[b].T, rows])  # [D + K, K]
        error = 0.0
        for n in range(NUM_TOKENS):
            wanted = torch.cat([targets[b, n], torch.zeros(num_keep, dtype=torch.float64)])
            solution = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
            rest = targets[b, n] - solution @ kept[b]
            error += float(weights[b, n] * rest @ rest)
        assert_close(float(found[b]), error / energy, rtol=1e-8, atol=1e-8)


def test_keeping_nothing_and_everything():
    targets, weights = make()
    nothing = ridge_error(targets, torch.zeros(3, 4, WIDTH, dtype=torch.float64), weights)
    assert_close(nothing, torch.ones(3, dtype=torch.float64))
    assert (ridge_error(targets, targets, weights, 1e-6) < 1e-6).all()


def test_a_blank_image_has_no_error_and_no_gradient():
    kept = torch.zeros(1, 4, WIDTH, requires_grad=True)
    error = ridge_error(torch.zeros(1, 6, WIDTH), kept, torch.full((1, 6), 1 / 6))
    error.sum().backward()
    assert error == 0
    assert (kept.grad == 0).all()


def test_the_error_does_not_depend_on_the_scale_of_the_tokens():
    targets, weights = make()
    small = ridge_error(targets, targets[:, :4], weights)
    assert_close(ridge_error(50 * targets, 50 * targets[:, :4], weights), small)


def test_gradients_of_the_closed_form():
    targets, weights = make(batch=2)
    kept = draw(2, 3, WIDTH, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ridge_error(targets, z, weights), (kept,))


def test_straight_through_is_the_choice_with_the_gradient_of_the_shares():
    targets, weights = make()
    logits = draw(3, 4, NUM_TOKENS, seed=9).requires_grad_()
    shares = token_shares(logits.softmax(dim=1))
    chosen = tokens_of_slots(logits.softmax(dim=1))
    kept = straight_through(shares, targets, chosen)
    assert_close(kept, take(targets, chosen), rtol=0, atol=0)
    # the same with the matrix S = onehot + P - stopgrad(P) written out
    onehot = torch.zeros_like(shares).scatter(2, chosen[:, :, None], 1.0)
    literal = (onehot + shares - shares.detach()) @ targets
    wanted = torch.autograd.grad(
        ridge_error(targets, literal, weights).sum(), logits, retain_graph=True
    )
    found = torch.autograd.grad(ridge_error(targets, kept, weights).sum(), logits)
    assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    assert found[0].abs().max() > 1e-4


@pytest.mark.parametrize("num_real", [13, 9])
def test_padding_changes_neither_error_nor_picks(num_real):
    targets, weights = make()
    targets, weights = targets[:, :num_real], weights[:, :num_real]
    valid = torch.arange(num_real + 3).expand(3, -1) < num_real
    wide, light = padded(targets, 3), padded(weights, 3)
    assert_close(
        ridge_error(wide, padded(targets[:, :4], 2), light),
        ridge_error(targets, targets[:, :4], weights),
    )
    picks = greedy_ridge(wide, light, num_real + 2, valid=valid)
    assert_close(picks[:, :num_real], greedy_ridge(targets, weights, num_real))
    assert (picks[:, num_real:] >= num_real).all()


# -------------------------------------------------------------- greedy teacher


def naive_greedy(targets, weights, num, penalty):
    """One image: deflate the tokens themselves, compare all pairs in every step."""
    rest = targets.clone()
    count = len(rest)
    energy = sum(float(weights[n] * rest[n] @ rest[n]) for n in range(count))
    picks = []
    for _ in range(num):
        best, chosen = -1.0, -1
        for s in range(count):
            if s in picks:
                continue
            explained = sum(float(weights[n]) * float(rest[n] @ rest[s]) ** 2 for n in range(count))
            score = explained / (float(rest[s] @ rest[s]) + penalty * energy)
            if score > best:
                best, chosen = score, s
        picks.append(chosen)
        row = rest[chosen].clone()
        rest = rest - torch.outer(rest @ row, row) / (row @ row + penalty * energy)
    return picks


@pytest.mark.parametrize("num", [1, 6, 13])
@pytest.mark.parametrize("penalty", [0.3, 0.01])
def test_the_teacher_is_the_naive_deflation(num, penalty):
    for seed in range(3):
        targets, weights = make(seed)
        found = greedy_ridge(targets, weights, num, penalty)
        wanted = [naive_greedy(targets[b], weights[b], num, penalty) for b in range(3)]
        assert found.tolist() == wanted


def test_the_teacher_restores_more_than_chance_and_first_tokens():
    targets, weights = make(batch=40)
    picks = greedy_ridge(targets, weights, 3)
    best = ridge_error(targets, take(targets, picks), weights)
    assert best.mean() < 0.9 * ridge_error(targets, targets[:, :3], weights).mean()


def test_the_teacher_leaves_no_token_twice_where_nothing_is_left():
    targets = torch.zeros(2, 6, 3)
    assert greedy_ridge(targets, torch.full((2, 6), 1 / 6), 6).tolist() == [[*range(6)]] * 2


# -------------------------------------------------------------------- matching


def naive_pairs(scores, num):
    """One image: look for the highest score among rows and columns that are free."""
    rows, columns = [], []
    for _ in range(num):
        free = [
            (float(scores[r, c]), -r, -c)
            for r in range(scores.shape[0])
            for c in range(scores.shape[1])
            if r not in rows and c not in columns
        ]
        _, row, column = max(free)
        rows.append(-row)
        columns.append(-column)
    return rows, columns


@pytest.mark.parametrize(("height", "width", "num"), [(4, 9, 4), (9, 4, 4), (5, 5, 5), (6, 8, 3)])
def test_greedy_pairs_are_the_naive_ones(height, width, num):
    scores = draw(3, height, width)
    scores[2] = scores[2].round()  # ties
    before = scores.clone()
    rows, columns = greedy_pairs(scores, num)
    for b in range(3):
        assert (rows[b].tolist(), columns[b].tolist()) == naive_pairs(scores[b], num)
    assert torch.equal(scores, before)


def test_slots_choose_by_their_share_not_by_their_attention():
    # slot 0 attends to everything, so that a token is a small share of it
    attention = torch.tensor([[[0.9, 0.8, 0.6, 0.9], [0.1, 0.2, 0.4, 0.1]]])
    assert_close(token_shares(attention).sum(dim=2), torch.ones(1, 2))
    slots, tokens = one_to_one(attention, 2)
    assert slots.tolist() == [[1, 0]]
    assert tokens.tolist() == [[2, 0]]
    assert tokens_of_slots(attention).tolist() == [[0, 2]]


def test_slots_never_share_a_token_and_take_padding_last():
    attention = draw(3, 6, 10).softmax(dim=1)
    attention[:, :, 0] = 1.0  # everybody's favourite
    valid = torch.arange(10) < torch.tensor([[10], [6], [4]])
    attention = attention * valid[:, None]
    chosen = tokens_of_slots(attention, valid)
    assert all(len(set(row)) == 6 for row in chosen.tolist())
    assert slot_choices(attention, valid).sum(dim=1).tolist() == [6, 6, 4]
    assert (slot_choices(attention, valid) <= valid).all()
    for b, count in enumerate([10, 6]):
        alone = tokens_of_slots(attention[b : b + 1, :, :count])
        assert_close(alone[0], chosen[b])


def test_a_slot_without_a_share_takes_a_real_token():
    attention, valid = draw(1, 6, 10).softmax(dim=1), (torch.arange(10) >= 4)[None]
    attention = attention * valid[:, None]
    attention[:, 2] = 0.0
    assert sorted(tokens_of_slots(attention, valid)[0].tolist()) == [4, 5, 6, 7, 8, 9]


def test_too_few_slots_are_refused():
    with pytest.raises(ValueError, match=r"3 slots cannot choose 4 tokens.*at least 4"):
        one_to_one(draw(1, 3, 9).softmax(dim=1), 4)


def test_cross_entropy_against_the_naive_matching():
    shares = token_shares(draw(3, 4, 9).softmax(dim=1))
    picks = torch.stack([draw(9, seed=b).argsort()[:4] for b in range(3)])
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[2, picks[2, 3]] = False
    found = cross_entropy(shares, picks, valid)
    assert_close(cross_entropy(shares[:2], picks[:2]), found[:2])
    for b in range(3):
        count = 3 if b == 2 else 4
        likely = shares[b][:, picks[b, :count]].log()
        rows, columns = naive_pairs(likely, count)
        wanted = -sum(float(likely[r, c]) for r, c in zip(rows, columns, strict=True)) / count
        assert_close(float(found[b]), wanted)


# ---------------------------------------------------------------- compiled steps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_compiled_step_is_one_graph_and_takes_the_same_tokens(dtype):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    valid = torch.arange(30) < torch.tensor([[30], [21], [9]])
    targets = (centred(draw(3, 30, 40), valid) * valid[:, :, None]).to(dtype)
    weights = draw(3, 30, seed=1).masked_fill(~valid, -torch.inf).softmax(dim=1).to(dtype)
    one = torch.compile(ridge_step, backend=backend, fullgraph=True, dynamic=False)
    for own in (valid, None):
        wanted = greedy_ridge(targets, weights, 12, valid=own)
        assert greedy_ridge(targets, weights, 12, valid=own, step=one).equal(wanted)
    assert len(graphs) == 1
    one = torch.compile(pairs_step, backend=backend, fullgraph=True, dynamic=False)
    scores = draw(3, 12, 30).to(dtype)
    for found, wanted in zip(greedy_pairs(scores, 12, one), greedy_pairs(scores, 12), strict=True):
        assert found.equal(wanted)
    assert len(graphs) == 2


# ----------------------------------------------------------------------- weights


@pytest.mark.parametrize("num_keep", [2, 8, 36])
def test_weights_are_the_attention_to_the_power_of_four_by_k(num_keep):
    scores = draw(2, 9, seed=3).softmax(dim=1)
    valid = torch.arange(9) < torch.tensor([[9], [7]])
    tokens = VisualTokens(draw(2, 9, 4), (3, 3), valid, attention={(-1, "cls"): scores})
    found = token_weights(tokens, "cls", -1, num_keep, 4.0)
    for b, count in enumerate([9, 7]):
        powers = [float(scores[b, n]) ** (4 / num_keep) for n in range(count)]
        wanted = torch.tensor([p / sum(powers) for p in powers] + [0.0] * (9 - count))
        assert_close(found[b], wanted)
    plain = token_weights(tokens, "none", -1, num_keep, 4.0)
    assert_close(plain, valid / valid.sum(dim=1, keepdim=True))


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="weights='given'; pass one of 'cls', 'received', 'none'"):
        token_weights(VisualTokens(draw(1, 4, 2), (2, 2)), "given", -1, 4, 4.0)


# -------------------------------------------------------------------- statistics


def test_statistics_are_of_all_real_tokens():
    tokens, valid = 3 + 2 * draw(4, 9, 5), torch.arange(9) < torch.tensor([[9], [4], [7], [1]])
    moments, statistics = Moments(), FeatureStatistics(5).double()
    assert_close(statistics(tokens), tokens, rtol=0, atol=0)  # not measured yet
    moments.add(tokens[:3], valid[:3])
    moments.add(tokens[3:], valid[3:])
    statistics.measure(moments)
    real = tokens[valid]
    wanted = (tokens - real.mean(dim=0)) / (real.std(dim=0, unbiased=False) + FLOOR)
    assert_close(statistics(tokens), wanted)
    assert statistics.num_tokens == 21
    with pytest.raises(ValueError, match="no token was counted"):
        statistics.measure(Moments())


def test_an_image_is_standardized_by_its_own_real_tokens():
    tokens, valid = 3 + 2 * draw(2, 9, 5), torch.arange(9) < torch.tensor([[9], [4]])
    found = standardized(tokens, valid)
    for b, count in enumerate([9, 4]):
        real = tokens[b, :count]
        deviation = real.std(dim=0, unbiased=False) + FLOOR
        assert_close(found[b, :count], (real - real.mean(dim=0)) / deviation)
        assert (found[b, count:] == 0).all()
    assert_close(standardized(tokens)[0], found[0])
