"""Choices by score: against loops over tokens, and what is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from ocvtp.pruners.checks import random_tokens
from ocvtp.selectors.choices import parse_choice
from ocvtp.slots.statistics import standardized
from ocvtp.structures import Needs

COUNT, GRID = 12, (4, 3)
CHOICES = [
    "topk", {"mmr": 0.5}, {"mmr": 0.0}, {"mmr": 1.0}, {"maxmin": 0.5}, {"maxmin": 0.0},
    {"restore": 0.0}, {"restore": 0.1},
]  # fmt: skip


@pytest.fixture(params=CHOICES, ids=str)
def choice(request):
    return request.param


def drawn(seed=0, ragged=False):
    """Scores and tokens of three images; ties among the scores."""
    tokens = random_tokens(Needs(projected=True), 3, GRID, seed=seed, ragged=ragged)
    numbers = torch.randint(0, 6, (3, COUNT), generator=torch.Generator().manual_seed(seed))
    return numbers / 3 - 1, tokens


def restored_by_hand(share, scores, features, num_keep):
    """By taking what each token restores away from all of them."""
    left = standardized(features[None])[0].double()
    weights = scores.double().sigmoid() + share
    weights = weights / weights.sum()
    extra = 0.3 * float((weights * left.square().sum(dim=1)).sum())
    taken = []
    while len(taken) < num_keep:
        gains = {}
        for n in set(range(len(scores))) - set(taken):
            mass = float(left[n].square().sum()) + extra
            gains[n] = float((weights * (left @ left[n]).square()).sum()) / mass
        taken.append(max(sorted(gains), key=lambda n: gains[n]))  # noqa: B023
        vector = left[taken[-1]]
        left = left - (left @ vector)[:, None] * vector / (vector.square().sum() + extra)
    return taken


def taken_by_hand(choice, scores, tokens, num_keep):
    """Of one image, without padding, in plain loops."""
    [(name, share)] = choice.items() if isinstance(choice, dict) else [(choice, None)]
    if name == "restore":
        return restored_by_hand(share, scores, tokens.features, num_keep)
    vectors = tokens.projected
    cosines = functional.cosine_similarity(vectors[:, None], vectors[None], dim=2)
    numbers = range(len(scores))
    best = sorted(numbers, key=lambda n: (-float(scores[n]), n))
    if name == "topk":
        return best[:num_keep]
    low, high = scores.min(), scores.max()
    taken = best[:1] if name == "mmr" else best[: max(1, round(share * num_keep))]
    while len(taken) < num_keep:
        values = {}
        for n in set(numbers) - set(taken):
            nearest = max(float(cosines[n, t]) for t in taken)
            scored = float((scores[n] - low) / (high - low))
            values[n] = share * scored - (1 - share) * nearest if name == "mmr" else -nearest
        taken.append(max(sorted(values), key=lambda n: values[n]))  # noqa: B023
    return taken


@pytest.mark.parametrize("ragged", [False, True])
def test_tokens_are_those_of_a_loop(choice, ragged):
    made = parse_choice(choice)
    for num_keep in range(1, COUNT + 1):
        scores, tokens = drawn(num_keep, ragged)
        selection = made.select(scores, tokens, num_keep)
        assert selection.keep_indices.shape == (3, num_keep)
        for b in range(3):
            real = int(tokens.real[b].sum())
            own = tokens.map(lambda values, b=b, real=real: values[b, :real])
            wanted = taken_by_hand(choice, scores[b, :real], own, min(num_keep, real))
            found = selection.keep_indices[b]
            if selection.valid is not None:
                found = found[selection.valid[b]]
            assert found.tolist() == sorted(wanted)


def test_tokens_of_a_smaller_budget_are_among_those_of_a_larger():
    scores, tokens = drawn()
    for choice in ("topk", {"mmr": 0.5}):
        kept = [
            parse_choice(choice).select(scores, tokens, num).keep_indices for num in range(1, 13)
        ]
        for less, more in zip(kept, kept[1:], strict=False):
            assert all(set(a) < set(b) for a, b in zip(less.tolist(), more.tolist(), strict=True))


def test_features_are_compared_where_nothing_is_projected():
    scores, tokens = drawn()
    bare = replace(tokens, projected=None)
    same = replace(tokens, projected=tokens.features)
    for choice in ({"mmr": 0.3}, {"maxmin": 0.3}):
        made = parse_choice(choice)
        one, other = (made.select(scores, t, 6).keep_indices for t in (bare, same))
        assert one.equal(other)


def test_equal_scores_and_equal_tokens_leave_the_first(choice):
    tokens = random_tokens(Needs(projected=True), 2, GRID).map(torch.ones_like)
    selection = parse_choice(choice).select(torch.zeros(2, COUNT), tokens, 4)
    assert selection.keep_indices.tolist() == [[0, 1, 2, 3]] * 2


def test_a_choice_says_what_it_is_made_of(choice):
    made = parse_choice(choice)
    assert made.describe() == choice
    assert parse_choice(made.describe()) == parse_choice(made) == made
    assert parse_choice({"topk": None}).describe() == "topk"
    assert parse_choice("mmr").describe() == {"mmr": 0.5}


@pytest.mark.parametrize(
    "wrong",
    [
        "top",
        None,
        3,
        {},
        {"mmr": 0.5, "maxmin": 0.5},
        {"mmr": 1.5},
        {"mmr": True},
        {"mmr": float("nan")},
        {"topk": 0.5},
        {3: 0.5},
        ["mmr"],
    ],
)
def test_what_is_no_choice_is_refused(wrong):
    with pytest.raises(ValueError, match=r"choice=.*; pass 'topk', or 'mmr', 'maxmin' or 'rest"):
        parse_choice(wrong)
