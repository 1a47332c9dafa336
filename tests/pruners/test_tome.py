"""ToMe's matching and schedules, against the official code's vectors and plain loops."""

from __future__ import annotations

import pytest
import torch
from tome_by_hand import naive_rows
from torch.testing import assert_close

import ocvtp
from ocvtp.ops.bipartite import even_schedule, first_places, match, means, parse_r, sums
from ocvtp.structures import VisualTokens
from ocvtp.towers.rows import Rows


@pytest.mark.parametrize(
    ("name", "r"),
    [(f"tome_{case}", r) for case in ("cls_n17", "nocls_n16") for r in (1, 4, 7, 99)],
)
def test_vectors(vectors, name, r):
    """`out`, `size`, `source` of the official merge; r = N is cut to half of the tokens."""
    reference = vectors(name)
    x, has_cls = reference["x"], "_cls_" in name
    key = f"r{x.shape[1] if r == 99 else r}"
    num_merged = min(r, (x.shape[1] - int(has_cls)) // 2)
    num_rows = x.shape[1] - num_merged
    row_of = match(reference["metric"], num_merged, has_cls)
    ones = torch.ones(x.shape[:2])
    for sizes, out, size in (
        (ones, "out", "size"),
        (reference["size_in"][:, :, 0], "out_sized", "size_sized"),
    ):
        mixed, total = means(x, sizes, row_of, num_rows)
        assert_close(mixed, reference[f"{key}.{out}"])
        assert_close(total[:, :, None], reference[f"{key}.{size}"])
    source = torch.nn.functional.one_hot(row_of, num_rows).transpose(1, 2)
    assert source.equal(reference[f"{key}.source"].long())
    mean, _ = means(x, ones, row_of, num_rows)
    assert_close(reference[f"{key}.merge_mean"], mean)
    unmerged = mean.gather(1, row_of[:, :, None].expand_as(x))
    assert_close(unmerged, reference[f"{key}.unmerge"])


@pytest.mark.parametrize(
    ("spec", "key"),
    [(16, "r16"), ((8, -1.0), "r8_dec"), ((8, 1.0), "r8_inc"), ((8, -0.5), "r8_m0.5")],
)
def test_parse_r(vectors, spec, key):
    assert list(parse_r(spec, 24)) == vectors("tome_parse_r")[f"L24_{key}"].tolist()


def test_parse_r_of_a_list(vectors):
    assert list(parse_r([6, 0, 5], 5)) == vectors("tome_parse_r")["L5_list"].tolist()
    assert parse_r(3, 1) == (3,)


@pytest.mark.parametrize("spec", [-1, 2.5, [1, 2, 3], [-1], (4, 2.0), (2.5, 0.0)])
def test_parse_r_refuses(spec):
    with pytest.raises(ValueError, match="pass (a whole r|whole numbers) from 0 on"):
        parse_r(spec, 2)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(576, 23), (16, 5), (17, 5), (9, 1)])
def test_every_budget_has_a_schedule_or_a_refusal(num_tokens, num_blocks):
    least = num_tokens
    for _ in range(num_blocks):
        least -= least // 2
    for num_keep in range(1, num_tokens + 1):
        if num_keep < least:
            with pytest.raises(ValueError, match=f"pass at least {least}"):
                even_schedule(num_tokens, num_keep, num_blocks)
            continue
        left, merged = num_tokens, even_schedule(num_tokens, num_keep, num_blocks)
        for r in merged:
            assert 0 <= r <= left // 2
            left -= r
        assert left == num_keep
        if num_keep >= num_tokens / 2:
            assert max(merged) - min(merged) <= 1, "not even"


def test_the_papers_budgets_are_even():
    """192 of 576 in LLaVA's 23 blocks, and 50."""
    assert sorted(even_schedule(576, 192, 23)) == [16] * 7 + [17] * 16
    assert sorted(even_schedule(576, 50, 23)) == [22] * 3 + [23] * 20


@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("count", [2, 5, 12, 13])
def test_matching_is_the_naive_one(has_cls, count):
    metric = torch.randn(3, count, 6, generator=torch.Generator().manual_seed(count))
    for r in range((count - int(has_cls)) // 2 + 1):
        row_of = match(metric, r, has_cls)
        for image in range(3):
            rows = naive_rows(metric[image], r, has_cls)
            assert len(rows) == count - r
            for number, row in enumerate(rows):
                assert row_of[image].eq(number).nonzero().flatten().tolist() == sorted(row)
        places = torch.arange(count).expand(3, -1)
        firsts = first_places(places, row_of, count - r)
        assert firsts[2].tolist() == [min(row) for row in rows]
        assert sums(torch.ones(3, count, 1), row_of, count - r)[2, :, 0].tolist() == [
            len(row) for row in rows
        ]


def test_select_merges_round_by_round():
    """Outside of a tower: 12 tokens by the keys of one block to 6, to 4."""
    keys = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(3))
    tokens = VisualTokens(keys, (3, 4), keys={-1: keys}, num_heads=2)
    selection = ocvtp.build_pruner("tome", num_keep=4).select(tokens)
    metric = keys.view(12, 2, 3).mean(dim=1)
    groups = naive_rows(metric, 6, has_cls=False)
    means_ = torch.stack([metric[group].mean(dim=0) for group in groups])
    merged = [sum((groups[i] for i in row), []) for row in naive_rows(means_, 2, has_cls=False)]
    expected = sorted(sorted(group) for group in merged)
    assert selection.keep_indices[0].tolist() == [group[0] for group in expected]
    for row, group in zip(selection.merge[0, :, 1:], expected, strict=True):
        assert row.nonzero().flatten().tolist() == group
        assert_close(row[group], torch.full((len(group),), 1 / len(group)))


def test_settings():
    with pytest.raises(ValueError, match=r"got r=8 and a budget; pass r, or one of"):
        ocvtp.build_pruner("tome", r=8, num_keep=4)
    with pytest.raises(ValueError, match="exactly one of them"):
        ocvtp.build_pruner("tome")
    with pytest.raises(ValueError, match="pass a whole r from 0 on"):
        ocvtp.build_pruner("tome", r=-1)
    keys = torch.randn(1, 9, 6)
    tokens = VisualTokens(keys, (3, 3), keys={-1: keys}, num_heads=2)
    for r, count in ((3, 6), ([2, 0, 1], 7), ((2, -1.0), 5), (8, 5)):
        assert ocvtp.build_pruner("tome", r=r).select(tokens).keep_indices.shape[1] == count
    by_r = ocvtp.build_pruner("tome", r=[6, 0, 5])
    assert by_r.schedule(16, 5, 4) == (6, 0, 5, 0, 0)
    assert ocvtp.build_pruner("tome", r=6).schedule(16, 5, 4) == (6, 5, 2, 1, 1)
    exact = ocvtp.build_pruner("tome", keep_ratio=0.25)
    assert exact.schedule(16, 6, 5) == (3, 3, 2, 2, 2, 0)


def test_rows_gather_and_scatter():
    """Rows go back to their places, padding nowhere; keys get their bias."""
    values = torch.arange(12.0).view(1, 6, 2).repeat(2, 1, 1)
    valid = torch.tensor([[True, True], [True, False]])
    rows = Rows.all(2, 6, values.device).keep(torch.tensor([[1, 4], [0, 2]]), valid, 1)
    assert rows.places.tolist() == [[0, 2, 5], [0, 1, 6]]
    picked = rows.gather(values)
    assert picked[0, :, 0].tolist() == [0, 4, 10]
    back = rows.scatter(picked)
    assert back[0, :, 0].tolist() == [0, 0, 4, 0, 0, 10]
    assert back[1, :, 0].tolist() == [0, 2, 0, 0, 0, 0]
    assert rows.ran().tolist() == [
        [True, False, True, False, False, True],
        [True, True, False, False, False, False],
    ]
    assert rows.bias().tolist() == [[0, 0, 0], [0, 0, float("-inf")]]
