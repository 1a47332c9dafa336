"""What every scorer must keep to, and what each computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ocvtp.pruners.checks import WIDTH, random_tokens
from ocvtp.selectors.scorer import Scores, Widths, build_scorer, list_scorers
from ocvtp.structures import LayerTokens, Needs

GRID, COUNT = (4, 3), 12
CASES = {
    "pointwise": ("pointwise", {"dim": 16}),
    "pointwise film": ("pointwise", {"dim": 16, "budget": "film"}),
    "prompted": ("prompted", {"dim": 16, "blocks": 2, "heads": 4}),
    "prompted film": ("prompted", {"dim": 16, "blocks": 2, "heads": 4, "budget": "film"}),
    "prompted without text": ("prompted", {"dim": 16, "blocks": 1, "heads": 2, "text": False}),
    "qk_mean": ("qk_mean", {}),
    "local_global": ("local_global", {"dim": 16}),
    "local_global of blocks": ("local_global", {"dim": 16, "blocks": 2, "heads": 4}),
    "local_global film": ("local_global", {"dim": 16, "budget": "film"}),
    "vip": (
        "vip",
        {"hidden": [3, 1], "dim": 8, "condition": 8, "blocks": 2, "heads": 2, "kind": "cls"},
    ),
    "slots": (
        "slots",
        {"layer": 3, "num_slots": 4, "hidden_dim": 16, "slot_dim": 8, "ffn_dim": 16}
        | {"standardize": True},
    ),
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
    scores = scorer(tokens_of(scorer), 4)
    read = [scores.values, *scores.aux.values()]
    sum((part * torch.randn_like(part)).sum() for part in read).backward()
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
    assert one.equal(other) == (case not in [*FILM, "slots"])


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
    ("name", "widths", "sizes", "count"),
    [
        ("pointwise", Widths(4096, 1024), {}, 2_106_369),
        ("qk_mean", Widths(3584, 1280), {}, 12_848_640),  # published, as are the next two
        ("qk_mean", Widths(2048, 1280), {}, 4_196_352),
        ("local_global", Widths(4096, 1024), {"blocks": 2}, 8_575_106),
        ("prompted", Widths(4096, 1024), {}, 17_084_417),
        ("vip", Widths(4096, 1024, 32), {}, 8_932_097),
        ("vip", Widths(4096, 1024, 32), {"kind": "last_heads"}, 8_940_033),
        ("vip", Widths(4096, 1024, 32), {"learnt": True}, 8_940_033 + 21 * 4096 + 4096 * 4098),
        ("slots", Widths(4096, 1024), {}, 7_616_512),
    ],
)
def test_parameters_at_the_width_of_a_large_model(name, widths, sizes, count):
    with torch.device("meta"):
        scorer = build_scorer(name, sizes, widths)
    assert sum(parameter.numel() for parameter in scorer.parameters()) == count


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
        ("qk_mean", {"dim": 0}, "dim=0; pass whole numbers above 0"),
        ("local_global", {"blocks": -1}, "blocks=-1; pass a whole number, at least 0"),
        ("local_global", {"dim": 12, "blocks": 1}, "dim=12, heads=8; .* multiple of 8"),
        ("vip", {"kind": "clss"}, "kind='clss'; pass one of cls, cls_sharpest, received"),
        ("vip", {"hidden": []}, r"hidden=\[\]; pass numbers of layers"),
        ("vip", {"dim": 8, "condition": 12, "heads": 2}, "whose sum is a multiple of 8"),
        ("slots", {"num_iterations": 0}, "num_iterations=0 is not allowed"),
        ("pointwise", {"dims": 2}, "'pointwise' has no setting 'dims'; did you mean 'dim'"),
    ],
)
def test_wrong_sizes_are_refused(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        build_scorer(name, sizes, Widths(WIDTH, WIDTH))


# ---------------------------------------------------------------- the others


def test_qk_mean_is_the_mean_product_with_all_keys():
    scorer = build("qk_mean")
    tokens = tokens_of(scorer, ragged=True)
    for b in range(3):
        own = tokens.projected[b, : int(tokens.real[b].sum())]
        query, key = scorer.to_query(own), scorer.to_key(own)
        wanted = (query @ key.T).mean(dim=1) / query.shape[1] ** 0.5
        assert_close(scorer(tokens).values[b, : len(own)], wanted)


@torch.no_grad()
def test_local_global_reads_its_own_half_and_the_mean_of_the_others():
    scorer = build("local_global")
    tokens = tokens_of(scorer)
    hidden = torch.nn.functional.gelu(scorer.reduce(scorer.norm(scorer.inputs(tokens.projected))))
    mean = hidden[:, :, 8:].mean(dim=1, keepdim=True).expand(-1, COUNT, -1)
    logits = scorer.out(torch.cat([hidden[:, :, :8], mean], dim=2))
    odds = logits.softmax(dim=2)[:, :, 0]
    assert_close(scorer(tokens).values.sigmoid(), odds)


@torch.no_grad()
def test_vip_reads_shares_of_attention():
    """Not how much of all attention the image gets."""
    scorer = build("vip")
    tokens = tokens_of(scorer)
    rows = tokens.attention[20, "cls"]
    halved, flat = (
        scorer(replace(tokens, attention={(20, "cls"): values})).values
        for values in (0.5 * rows, torch.full_like(rows, 0.1))
    )
    assert_close(halved, scorer(tokens).values)
    assert not torch.allclose(flat, halved)


@torch.no_grad()
def test_vip_reads_every_head():
    sizes = {"hidden": [3], "dim": 8, "condition": 8, "blocks": 1, "heads": 2}
    scorer = build_scorer("vip", sizes | {"kind": "last_heads"}, Widths(WIDTH, WIDTH, 3))
    tokens = random_tokens(Needs(hidden=(3,)), 3, (4, 3), ragged=True)
    rows = torch.rand(3, 12, 3, generator=torch.Generator().manual_seed(1))
    key = 20, "last_heads"
    found, swapped, of_one = (
        scorer(replace(tokens, attention={key: values})).values
        for values in (rows, rows.flip(2), rows.clone().index_fill_(2, torch.tensor([1]), 0.1))
    )
    assert not torch.allclose(found, swapped)
    assert not torch.allclose(found, of_one)
    mean = build_scorer("vip", sizes, Widths(WIDTH, WIDTH, 3))  # of one row
    weights = scorer.state_dict()
    mean.load_state_dict(weights | {"attended.weight": weights["attended.weight"].sum(1, True)})
    alike = {key: rows[:, :, :1].expand(-1, -1, 3), (20, "last"): rows[:, :, 0]}
    tokens = replace(tokens, attention=alike)
    assert_close(scorer(tokens).values, mean(tokens).values)
    with pytest.raises(ValueError, match="is of 2 heads, and this scorer was trained on 3"):
        scorer(replace(tokens, attention={key: rows[:, :, :2]}))
    for told, of in (
        ({"kind": "last_heads"}, "kind='last_heads'"),
        ({"learnt": True}, "learnt=Tr"),
    ):
        with pytest.raises(ValueError, match=f"{of}.* reads every .* kind='last'"):
            build_scorer("vip", sizes | told, Widths(WIDTH, WIDTH))


def test_vip_reads_a_column_that_learns():
    sizes = {"hidden": [3], "dim": 8, "condition": 8, "blocks": 1, "heads": 2, "block": 1}
    scorer = build_scorer("vip", sizes | {"learnt": True}, Widths(WIDTH, WIDTH, 3))
    tokens = random_tokens(scorer.needs, 3, (4, 3))
    seen = []

    def column(vectors):
        seen.append(vectors)
        return (tokens.features @ vectors.T).abs().repeat(1, 1, 2)[:, :, :3] + 0.1

    inside = LayerTokens(**vars(tokens), places=torch.arange(12).expand(3, 12), column=column)
    assert tokens.missing(scorer.needs) == ["column"]
    assert not inside.missing(scorer.needs)
    scorer(inside).values.square().sum().backward()
    (vectors,) = seen
    assert vectors.shape == (2, WIDTH)
    assert_close(vectors.square().mean(dim=1), torch.ones(2), rtol=0.01, atol=0.01)  # normed
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in scorer.parameters())
    with torch.no_grad():
        one = scorer(inside.map(lambda values: values[1:2])).values
        assert_close(one, scorer(inside).values[1:2])
    with pytest.raises(ValueError, match="block=-1.*of a layer, from 0 on"):
        build_scorer("vip", sizes | {"learnt": True, "block": -1}, Widths(WIDTH, WIDTH, 3))


@torch.no_grad()
def test_slots_are_as_many_as_tokens_are_kept():
    scorer = build("slots")
    tokens = tokens_of(scorer, ragged=True)
    for num_keep, count in ((None, 4), (7, 7)):
        scores = scorer(tokens, num_keep)
        assert scores.aux["slots"].shape == (3, count, 8)
        attention = scores.aux["attention"]
        shares = attention / attention.sum(dim=2, keepdim=True)
        assert_close(scores.values, shares.amax(dim=1))
        assert not scores.values[~tokens.valid].any()
