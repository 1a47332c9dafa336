"""VFlowOpt against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import ocvtp
from ocvtp.pruners.layer_pruner import LayerStage
from ocvtp.structures import LayerTokens, Needs, VisualTokens
from ocvtp.towers.rows import Rows
from ocvtp.towers.taps import attention_mean

KEY = (-2, "global")


def build(**settings):
    return ocvtp.build_pruner("vflowopt", **settings)


def make_tokens(batch=1, grid_hw=(6, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = grid_hw[0] * grid_hw[1]
    importance = torch.randn(batch, count, generator=generator).softmax(dim=1)
    return VisualTokens(torch.zeros(batch, count, 4), grid_hw, attention={KEY: importance})


# ---------------------------------------------------------------------- how much tokens matter


def by_hand(weights, num_prefix):
    """[H, T, T] -> [N]: the rows of the tokens that stand out, averaged."""
    mean = weights.mean(dim=0)
    received = mean.mean(dim=0)[num_prefix:]
    bar = min(2 * float(received.mean()), float(received.max()))
    rows = [num_prefix + i for i, share in enumerate(received.tolist()) if share >= bar]
    return mean[rows].mean(dim=0)[num_prefix:], len(rows)


@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_importance_is_what_the_global_tokens_attend_to(num_prefix, spread):
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(2, 3, 21, 8, generator=generator).unbind()
    queries, keys = queries + 1, spread * keys + 3 * (torch.arange(21) % 9 == 4)[:, None]
    found = attention_mean(queries, keys, 2, "global", num_prefix)
    heads = [x.unflatten(2, (2, 4)).transpose(1, 2) for x in (queries, keys)]
    weights = (heads[0] @ heads[1].transpose(2, 3) / 2).softmax(dim=-1)
    numbers = []
    for image, own in zip(weights, found, strict=True):
        expected, number = by_hand(image, num_prefix)
        numbers.append(number)
        assert_close(own, expected)
    assert numbers != [21 - num_prefix] * 3


def test_flat_attention_has_global_tokens_too():
    flat = torch.zeros(1, 9, 8)
    assert_close(attention_mean(flat, flat, 2, "global", 1), torch.full((1, 8), 1 / 9))


def test_padding_is_no_global_token():
    """Rows of fewer tokens, padded, say what they say alone."""
    generator = torch.Generator().manual_seed(2)
    queries, keys = (2 * torch.randn(2, 1, 12, 8, generator=generator)).unbind()
    alone = attention_mean(queries[:, :9], keys[:, :9], 2, "global", 1)
    index = torch.arange(12)[None]
    rows = Rows(places=index, num_tokens=12, real=index < 9)
    padded = attention_mean(queries, keys, 2, "global", 1, rows=rows)
    assert_close(padded[:, :8], alone)


# ------------------------------------------------------------ before the language model


@pytest.mark.parametrize("cell", [1, 2, 3, 100])
@pytest.mark.parametrize("num_keep", [1, 5, 20, 41, 42])
def test_what_is_dropped_goes_to_the_best_of_its_cell(cell, num_keep):
    tokens = make_tokens(3)
    selection = build(num_keep=num_keep, cell=cell).select(tokens)
    for scores, kept, merge in zip(
        tokens.attention[KEY].tolist(),
        selection.keep_indices.tolist(),
        selection.merge,
        strict=True,
    ):
        best = sorted(range(42), key=lambda i: -scores[i])[:num_keep]
        assert kept == sorted(best)
        for token, row in zip(kept, merge, strict=True):
            where = token // 7 // cell, token % 7 // cell
            members = [i for i in range(42) if (i // 7 // cell, i % 7 // cell) == where]
            own = {token: 1.0}
            if token == max(members, key=lambda i: scores[i]) and cell > 1:
                dropped = [i for i in members if i not in best]
                total = scores[token] + sum(scores[i] for i in dropped)
                own = {i: scores[i] / total for i in [token, *dropped]}
            assert row.nonzero()[:, 0].tolist() == [1 + i for i in sorted(own)]
            assert_close(row[[1 + i for i in own]], torch.tensor(list(own.values())))


def test_cells_need_a_grid():
    tokens = make_tokens()
    packed = VisualTokens(tokens.features, (6, 6), attention=tokens.attention)
    with pytest.raises(ValueError, match="42 tokens are no 6 x 6; use a pruner .or an option"):
        build(num_keep=9).select(packed)
    assert build(num_keep=9, cell=1).select(packed).keep_indices.shape == (1, 9)


def test_wrong_settings():
    with pytest.raises(ValueError, match="cell=0; pass the side of a cell"):
        build(num_keep=9, cell=0)


# ------------------------------------------------------------------------------------- both halves


@pytest.mark.parametrize("budget", [{"num_keep": 12}, {"keep_ratio": 12 / 42}])
def test_a_budget_is_an_average(budget):
    first, later = build(**budget).parts
    before = first.select(make_tokens()).keep_indices.shape[1]
    assert before == 21
    assert later.schedule(28, before) == (LayerStage(9, 10), LayerStage(18, 5))
    assert [stage.layer for stage in later.schedule(32, before)] == [10, 21]
    assert (9 * 21 + 9 * 10 + 10 * 5) / 28 == pytest.approx(12, abs=0.3)


def test_explicit_stages():
    first, later = build(num_keep=20, stages=((1, 7), (2, 0.1))).parts
    assert first.select(make_tokens()).keep_indices.shape[1] == 20
    assert later.schedule(3, 20) == (LayerStage(1, 7), LayerStage(2, 2))


def test_later_the_same_importance_counts():
    _, later = build(num_keep=20, stages=((1, 7),)).parts
    tower = make_tokens(2)
    places = torch.tensor([[3, 8, 11, -1, 20, 30, 31, -1, 41], [0, 1, 2, -1, 5, 6, 7, 9, 13]])
    tokens = LayerTokens(torch.zeros(2, 9, 6), (1, 9), places=places, tower=tower)
    kept = later.select_at(tokens, 1, 4).keep_indices.tolist()
    for own, where, scores in zip(kept, places.tolist(), tower.attention[KEY], strict=True):
        known = [p if p >= 0 else where[i - 1] for i, p in enumerate(where)]
        assert own == sorted(sorted(range(9), key=lambda i: -float(scores[known[i]]))[:4])
    assert later.tower_needs == Needs(attention=(KEY,))
