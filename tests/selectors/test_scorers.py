"""What every scorer must keep to, and what each computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ocvtp.pruners.checks import WIDTH, random_tokens
from ocvtp.selectors.scorer import Scores, Widths, build_scorer, list_scorers, scorer_class

GRID, COUNT = (4, 3), 12
CASES = {
    "pointwise": ("pointwise", {"dim": 16}),
    "pointwise film": ("pointwise", {"dim": 16, "budget": "film"}),
    "prompted": ("prompted", {"dim": 16, "blocks": 2, "heads": 4}),
    "prompted film": ("prompted", {"dim": 16, "blocks": 2, "heads": 4, "budget": "film"}),
    "prompted without text": ("prompted", {"dim": 16, "blocks": 1, "heads": 2, "text": False}),
}
FILM = [case for case, (_, sizes) in CASES.items() if sizes.get("budget") == "film"]


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def build(case, seed=0):
    """A scorer none of whose weights is 0, as after training."""
    name, sizes = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scorer = build_scorer(name, sizes, Widths(WIDTH, WIDTH)).eval()
        for parameter in scorer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for _, statistics in scorer.statistics():
            statistics.mean += torch.randn_like(statistics.mean)
            statistics.scale += torch.rand_like(statistics.scale)
    return scorer


def tokens_of(scorer, batch=3, ragged=False):
    return random_tokens(scorer.needs, batch, GRID, ragged=ragged)


def image(tokens, b):
    return tokens.map(lambda t: t[b : b + 1])


def test_all_of_this_package_are_here():
    assert {name for name, _ in CASES.values()} == set(list_scorers())


@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_a_batch_equals_its_images(case, ragged):
    """Also without the padding of tokens and of the prompt."""
    scorer = build(case)
    tokens = tokens_of(scorer, ragged=ragged)
    together = scorer(tokens, 4)
    assert isinstance(together, Scores)
    assert together.values.shape == (3, COUNT)
    assert together.values.dtype == torch.float32
    assert together.values.isfinite().all()
    for b in range(3):
        real = int(tokens.real[b].sum())
        alone = image(tokens, b).map(
            lambda t: t[:, :real] if t.ndim > 1 and t.shape[1] == COUNT else t  # noqa: B023
        )
        if tokens.text_valid is not None:
            said = int(tokens.text_valid[b].sum())
            alone = replace(alone, text=alone.text[:, :said], text_valid=None)
        alone = replace(alone, valid=None, grid_hw=(real // GRID[1], GRID[1]))
        assert_close(scorer(alone, 4).values[0], together.values[b, :real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_lies_on_padding_changes_nothing(case):
    scorer = build(case)
    tokens = tokens_of(scorer, ragged=True)

    def spoilt(values):
        if not values.is_floating_point():
            return values
        real = {COUNT: tokens.valid, 5: tokens.text_valid}[values.shape[1]]
        real = real[:, :, None] if values.ndim == 3 else real
        return torch.where(real, values, torch.full_like(values, float("nan")))

    found, wanted = scorer(tokens.map(spoilt), 4).values, scorer(tokens, 4).values
    assert_close(found, wanted, rtol=0, atol=0)
    assert found.isfinite().all()


def test_every_weight_is_learnt(case):
    scorer = build(case)
    (scorer(tokens_of(scorer), 4).values * torch.randn(3, COUNT)).sum().backward()
    for name, parameter in scorer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_half_precision_is_scored_as_the_same_values(case):
    scorer = build(case)
    tokens = tokens_of(scorer).map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    exact = tokens.map(lambda t: t.float() if t.is_floating_point() else t)
    assert_close(scorer(tokens, 4).values, scorer(exact, 4).values, rtol=0, atol=0)


@torch.no_grad()
def test_only_those_that_are_told_the_budget_depend_on_it(case):
    scorer = build(case)
    tokens = tokens_of(scorer)
    one, other = (scorer(tokens, num_keep).values for num_keep in (2, 9))
    assert one.equal(other) == (case not in FILM)


@pytest.mark.parametrize("case", FILM)
@torch.no_grad()
def test_film_begins_as_nothing_and_wants_a_budget(case):
    name, sizes = CASES[case]
    torch.manual_seed(0)
    scorer = build_scorer(name, sizes, Widths(WIDTH, WIDTH)).eval()
    tokens = tokens_of(scorer)
    assert scorer(tokens, 2).values.equal(scorer(tokens, 9).values)
    with pytest.raises(ValueError, match=r"told the budget \(budget='film'\); pass num_keep"):
        scorer(tokens)


@torch.no_grad()
def test_a_share_is_one_of_the_images_own_tokens():
    """A budget beyond an image's tokens is all of them, whatever it is padded to."""
    scorer = build("pointwise film")
    tokens = tokens_of(scorer, ragged=True)  # 12 and 9 tokens
    few, many = scorer(tokens, 9).values, scorer(tokens, 12).values
    assert few[1].equal(many[1])
    assert not few[0].equal(many[0])


@pytest.mark.parametrize(
    ("name", "widths", "millions"),
    [("pointwise", Widths(4096, 1024), 2.1), ("prompted", Widths(4096, 1024), 17.1)],
)
def test_sizes_at_the_width_of_a_large_model(name, widths, millions):
    with torch.device("meta"):
        scorer = scorer_class(name)()
        scorer.build(widths)
    count = sum(parameter.numel() for parameter in scorer.parameters())
    assert round(count / 1e6, 1) == millions


# ---------------------------------------------------------------- prompted


@torch.no_grad()
def test_the_prompt_is_read_unless_it_is_not():
    for case, reads in (("prompted", True), ("prompted without text", False)):
        scorer = build(case)
        assert scorer.needs.text == reads
        tokens = tokens_of(scorer)
        tokens = replace(tokens, text=torch.randn(3, 5, WIDTH), text_valid=None)
        other = replace(tokens, text=torch.randn(3, 5, WIDTH))
        assert scorer(tokens).values.equal(scorer(other).values) != reads


@torch.no_grad()
def test_an_empty_prompt_is_one():
    scorer = build("prompted")
    tokens = tokens_of(scorer)
    none = replace(tokens, text_valid=torch.zeros(3, 5, dtype=torch.bool))
    empty = replace(tokens, text=tokens.text[:, :0], text_valid=tokens.text_valid[:, :0])
    values = scorer(none).values
    assert values.isfinite().all()
    assert_close(scorer(empty).values, values)


@torch.no_grad()
def test_places_are_read_where_there_are_any():
    scorer = build("prompted")
    tokens = tokens_of(scorer)
    whole = torch.tensor([[[*GRID]]]).expand(3, -1, -1)
    assert_close(scorer(replace(tokens, grids=whole)).values, scorer(tokens).values)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    moved = replace(
        tokens, features=tokens.features[:, order], projected=tokens.projected[:, order]
    )
    assert not torch.allclose(scorer(moved).values, scorer(tokens).values[:, order])
    placeless, moved = replace(tokens, grid_hw=(0, 0)), replace(moved, grid_hw=(0, 0))
    assert_close(scorer(moved).values, scorer(placeless).values[:, order])


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("prompted", {"dim": 0}, r"dim=0, blocks=4, heads=8; pass whole numbers above 0"),
        ("prompted", {"dim": 18, "heads": 4}, "dim=18, heads=4; pass a dim .* multiple of 4"),
        ("prompted", {"dim": 6, "heads": 2}, "pass a dim that is a multiple of 4"),
        ("prompted", {"budget": "told"}, "budget='told'; pass one of none, film"),
        ("pointwise", {"dim": 1.5}, "dim=1.5; pass whole numbers above 0"),
        ("pointwise", {"budget": True}, "budget=True; pass one of none, film"),
        ("pointwise", {"dims": 2}, "'pointwise' has no size 'dims'; did you mean 'dim'"),
    ],
)
def test_wrong_sizes_are_refused(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        build_scorer(name, sizes, Widths(WIDTH, WIDTH))
