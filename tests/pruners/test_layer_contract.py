"""What every pruner inside the language model must keep to, where it reads `LayerTokens`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_networks import network_setting
from test_contract import DEVICES, INSIDE, NoSync, check_indices, check_merge, flatten, image
from torch.testing import assert_close

import ocvtp
from ocvtp.structures import LayerTokens

COUNTS = [16, 15, 42]
WIDTH, HEADS, TEXT, LAYER = 8, 2, 6, 3
CASES = {
    "sparsevlm": ("sparsevlm", {}),
    "sparsevlm plus": ("sparsevlm", {"plus": True}),
    "pyramiddrop": ("pyramiddrop", {}),
    "fastv": ("fastv", {}),
    "dart": ("dart", {}),
    "dart image alone": ("dart", {"text_pivots": 0, "image_pivots": 3}),
    "dart all text": ("dart", {"text_pivots": 9, "image_pivots": 1}),
    "topv": ("topv", {"relative": 0.0, "centre": 0.0}),
    "learned": ("learned_layers", {}),
    "learned by the prompt": ("learned_layers", {"scorer": "prompted", "choice": {"mmr": 0.5}}),
}
MAPS = ("hidden", "attention", "keys", "cls_keys", "cls_queries", "text_keys", "normed")
MAPS = (*MAPS, "text_normed")


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def build(case, num_keep, **more):
    name, settings = CASES[case]
    if name == "learned_layers":
        scorer = settings.get("scorer", "pointwise")
        settings = {"choice": settings.get("choice")}
        settings |= network_setting(name, WIDTH, scorer=scorer, layer=LAYER)
    return ocvtp.build_pruner(name, stages=((LAYER, num_keep),), **settings, **more)


def make_tokens(pruner, batch, count, dtype=torch.float32):
    """Random tokens that hold just what the pruner needs; texts of other lengths."""
    needs = pruner.needs_at(LAYER)

    def draw(i, *shape):
        rows = []
        for b in range(batch):
            generator = torch.Generator().manual_seed(20 * b + i)
            rows.append(torch.randn(*shape, generator=generator))
        return torch.stack(rows).to(dtype)

    text_valid = torch.arange(TEXT) < TEXT - torch.arange(batch)[:, None] % 4
    return LayerTokens(
        features=draw(0, count, WIDTH),
        grid_hw=(1, count),
        places=torch.arange(count).repeat(batch, 1),
        attention={
            key: (2 * draw(1 + i, count).float()).softmax(dim=1)
            for i, key in enumerate(needs.attention)
        },
        keys={block: draw(5, count, WIDTH) for block in needs.keys},
        num_heads=HEADS,
        text=draw(6, TEXT, WIDTH),
        text_valid=text_valid,
        text_keys={block: draw(7, TEXT, WIDTH) for block in needs.keys},
        normed={name: draw(8, count, WIDTH) for name in needs.normed},
        text_normed={name: draw(9, TEXT, WIDTH) for name in needs.normed},
    )


def select(pruner, tokens, num_keep):
    return pruner.select_at(tokens, LAYER, num_keep)


def test_whatever_the_other_contract_leaves_out_is_here():
    assert {name for name, _ in CASES.values()} >= INSIDE


@pytest.mark.parametrize("count", COUNTS)
def test_exactly_k_ascending_indices(case, count):
    for num_keep in range(1, count + 1):
        pruner = build(case, num_keep)
        selection = select(pruner, make_tokens(pruner, 3, count), num_keep)
        assert selection.valid is None
        check_indices(selection, 3, num_keep, count)
        check_merge(pruner, selection, count)


def test_what_is_no_larger_than_the_budget_is_left_alone(case):
    pruner = build(case, 20)
    selection = select(pruner, make_tokens(pruner, 2, 16), 20)
    assert selection.keep_indices.tolist() == [list(range(16))] * 2
    assert selection.merge is None


def test_a_batch_equals_its_images(case):
    """Text of other lengths included: padding behind a text changes nothing."""
    pruner = build(case, 9)
    tokens = make_tokens(pruner, 4, 42)
    together = select(pruner, tokens, 9)
    for b in range(4):
        length = int(tokens.text_valid[b].sum())
        alone = image(tokens, b).map(
            lambda t: t[:, :length] if t.ndim > 1 and t.shape[1] == TEXT else t  # noqa: B023
        )
        alone = select(pruner, alone, 9)
        assert_close(alone.keep_indices[0], together.keep_indices[b])
        if together.merge is not None:
            assert_close(alone.merge[0], together.merge[b])
            assert_close(alone.anchors[0], together.anchors[b])


def test_repeatable_and_inputs_untouched(case):
    pruner = build(case, 9)
    tokens = make_tokens(pruner, 2, 42)
    before = tokens.map(torch.clone)
    first, second = select(pruner, tokens, 9), select(build(case, 9), tokens, 9)
    assert first.keep_indices.equal(second.keep_indices)
    assert first.merge is None or first.merge.equal(second.merge)
    after = flatten(tokens)
    for key, tensor in flatten(before).items():
        assert after[key].equal(tensor), key


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_what_fp32_keeps_of_the_same_values(case, dtype, device):
    pruner = build(case, 9)
    tokens = make_tokens(pruner, 2, 42, dtype).map(lambda t: t.to(device))
    exact = tokens.map(lambda t: t.float() if t.is_floating_point() else t)
    half, full = select(pruner, tokens, 9), select(pruner, exact, 9)
    assert half.keep_indices.device.type == device
    assert half.keep_indices.equal(full.keep_indices)
    assert half.merge is None or half.merge.equal(full.merge)


def test_non_contiguous_inputs(case):
    pruner = build(case, 9)
    tokens = make_tokens(pruner, 2, 42)
    strided = tokens.map(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))
    one, other = select(pruner, strided, 9), select(pruner, tokens, 9)
    assert_close(one.keep_indices, other.keep_indices)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_all_equal_tokens(case, value):
    for num_keep in (1, 5, 41):
        pruner = build(case, num_keep)
        tokens = make_tokens(pruner, 2, 42)
        tokens = tokens.map(lambda t: torch.full_like(t, value) if t.is_floating_point() else t)
        selection = select(pruner, tokens, num_keep)
        check_indices(selection, 2, num_keep, 42)
        check_merge(pruner, selection, 42)


def test_tokens_of_low_rank(case):
    for num_keep in (2, 31, 63):
        pruner = build(case, num_keep)
        tokens = make_tokens(pruner, 2, 64).map(
            lambda t: (
                t[:, :3].repeat(1, 22, 1)[:, :64]
                if t.is_floating_point() and t.ndim == 3 and t.shape[1] == 64
                else t
            )
        )
        selection = select(pruner, tokens, num_keep)
        check_indices(selection, 2, num_keep, 64)
        check_merge(pruner, selection, 64)


@pytest.mark.slow
def test_one_graph(case):
    """The choice compiles whole: nothing in it depends on values."""
    pruner = build(case, 9)
    tokens = make_tokens(pruner, 2, 42)
    keys = {name: list(getattr(tokens, name)) for name in MAPS}

    @torch.compile(fullgraph=True, backend="eager", dynamic=False)
    def run(given):
        plain = {name: value for name, value in given.items() if "/" not in name}
        held = {m: {key: given[f"{m}/{key}"] for key in keys[m]} for m in MAPS}
        made = LayerTokens(grid_hw=tokens.grid_hw, num_heads=HEADS, **plain, **held)
        selection = pruner.select_at(made, LAYER, 9)
        return [t for t in (selection.keep_indices, selection.merge) if t is not None]

    torch._dynamo.reset()
    with torch.no_grad():
        found = run(flatten(tokens))
    selection = select(pruner, tokens, 9)
    wanted = [t for t in (selection.keep_indices, selection.merge) if t is not None]
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


def test_no_host_sync(case):
    pruner = build(case, 9)
    tokens = make_tokens(pruner, 2, 42)
    with NoSync():
        select(pruner, tokens, 9)
        pruner.raters(tokens)


@pytest.mark.parametrize("case", ["sparsevlm", "dart", "topv"])
def test_padded_images_are_refused(case):
    pruner = build(case, 9)
    tokens = make_tokens(pruner, 2, 42)
    padded = replace(tokens, valid=torch.arange(42).expand(2, -1) < 40)
    with pytest.raises(ValueError, match=f"{case} cannot read padded images.*equally many"):
        select(pruner, padded, 9)
