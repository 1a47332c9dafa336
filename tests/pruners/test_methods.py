"""Each method against the official code or a naive loop."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import ocvtp
from ocvtp.ops.selection import fill_up, top_k
from ocvtp.slots.attention import slot_winners
from ocvtp.structures import VisualTokens

CASES = [f"rand{i}.cls{c}" for i in range(4) for c in (0, 1)]
CASES += [f"dup.cls{c}.{mode}" for c in (0, 1) for mode in ("None", "att_score")]


def _patches(ids, has_cls):
    """Official ids, where 0 is the CLS, as patch numbers."""
    return [i - 1 for i in ids.tolist() if i > 0] if has_cls else ids.tolist()


@pytest.mark.parametrize("case", CASES)
def test_slot_winners_equal_the_official_ids(vectors, case):
    reference = vectors("selection")
    won = slot_winners(reference[f"{case}.attn"])[0].nonzero().flatten().tolist()
    assert won == _patches(reference[f"{case}.ids"], ".cls1" in case)


def test_two_tokens_per_slot(vectors):
    reference = vectors("selection")
    won = slot_winners(reference["topk2.cls1.attn"], tokens_per_slot=2)[0]
    assert won.nonzero().flatten().tolist() == _patches(reference["topk2.cls1.ids"], True)


def test_tokens_that_are_always_kept(vectors):
    reference = vectors("selection")
    won = slot_winners(reference["keep_always.cls1.attn"])
    won[:, [3 - 1, 36 - 1]] = True
    assert won[0].nonzero().flatten().tolist() == _patches(reference["keep_always.cls1.ids"], True)


@pytest.mark.parametrize("rows", ["meanq", "cls"])
@pytest.mark.parametrize("case", ["rand0.cls1", "rand1.cls1", "dup.cls1.att_score"])
@pytest.mark.parametrize("target", [4, 7, 12, 37])
def test_fill_equals_the_official_one(vectors, rows, case, target):
    reference = vectors("selection")
    key = f"pad.{rows}.{case}.t{target}.ids"
    if key not in reference:
        assert target == 4  # the only size that some cases lack
        return
    weights = reference["pad.attn_weights"].mean(dim=1)  # [1, 37, 37]
    scores = (weights.mean(dim=1) if rows == "meanq" else weights[:, 0])[:, 1:]
    won = slot_winners(reference[f"{case}.attn"])
    selection = fill_up(won, scores, target - 1)  # theirs counts the CLS, which is always kept
    assert selection.keep_indices[0].tolist() == _patches(reference[key], True)


@pytest.mark.parametrize("num_keep", [16])
def test_fastervlm_is_vispruner_with_ratio_one(vectors, num_keep):
    reference = vectors("vispruner")
    tokens = VisualTokens(
        features=reference["features"],
        grid_hw=(8, 8),
        attention={(-2, "cls"): reference["cls_attn"].mean(dim=1)},
    )
    selection = ocvtp.build_pruner("fastervlm", num_keep=num_keep).select(tokens)
    mask = torch.zeros(2, 64, dtype=torch.bool).scatter_(1, selection.keep_indices, True)
    assert_close(mask, reference[f"mask_k{num_keep}_r100"])


def test_ocvtp_against_a_naive_loop(small_network):
    torch.manual_seed(1)
    features, received = torch.randn(3, 16, 8), torch.rand(3, 16)
    tokens = VisualTokens(
        features, (4, 4), hidden={3: features}, attention={(-2, "received"): received}
    )
    pruner = ocvtp.build_pruner("ocvtp", num_keep=7, network=small_network)
    selection = pruner.select(tokens)
    _, attention = small_network.assign(features, 7)
    assert_close(pruner.masks(tokens), attention.detach())
    for b in range(3):
        chosen = {int(attention[b, s].argmax()) for s in range(7)}
        for token in sorted(range(16), key=lambda t: -float(received[b, t])):  # noqa: B023
            if len(chosen) < 7:
                chosen.add(token)
        assert selection.keep_indices[b].tolist() == sorted(chosen)


def test_ocvtp_with_more_slots_than_tokens_kept(small_network):
    features, received = torch.randn(2, 16, 8), torch.rand(2, 16)
    tokens = VisualTokens(
        features, (4, 4), hidden={3: features}, attention={(-2, "received"): received}
    )
    pruner = ocvtp.build_pruner("ocvtp", num_keep=3, num_slots=12, network=small_network)
    _, attention = small_network.assign(features, 12)
    best = (received + 10 * slot_winners(attention)).topk(3).indices.sort().values
    assert_close(pruner.select(tokens).keep_indices, best)


@pytest.mark.parametrize(("count", "kept"), [(576, 64), (16, 16), (17, 5), (9, 1)])
def test_uniform(count, kept):
    tokens = VisualTokens(torch.zeros(2, count, 1), (1, count))
    indices = ocvtp.build_pruner("uniform", num_keep=kept).select(tokens).keep_indices
    assert indices.tolist() == [[int((i + 0.5) * count / kept) for i in range(kept)]] * 2


def test_random_is_uniform_over_tokens_and_differs_by_seed_and_place():
    tokens = VisualTokens(torch.zeros(2000, 36, 1), (6, 6))
    draw = ocvtp.build_pruner("random", num_keep=9).select(tokens).keep_indices
    share = torch.zeros(36).index_add_(0, draw.flatten(), torch.ones(draw.numel())) / 2000
    assert (share - 0.25).abs().max() < 0.04
    assert len({tuple(row) for row in draw.tolist()}) > 1900
    other = ocvtp.build_pruner("random", num_keep=9, seed=1).select(tokens).keep_indices
    assert (draw == other).all(dim=1).float().mean() < 0.01
    first = VisualTokens(torch.zeros(1, 36, 1), (6, 6))
    again = ocvtp.build_pruner("random", num_keep=9).select(first).keep_indices
    assert_close(again[0], draw[0])


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert top_k(scores, 2).keep_indices.tolist() == [[1, 2]]
    chosen = torch.tensor([[False, False, False, False, True]])
    assert fill_up(chosen, scores, 3).keep_indices.tolist() == [[1, 2, 4]]
