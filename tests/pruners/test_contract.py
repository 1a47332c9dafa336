"""What every registered pruner must keep to."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, replace

import pytest
import torch
from small_networks import network_setting
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import ocvtp
from ocvtp.pruners import pruner_class
from ocvtp.pruners.catalog import entry
from ocvtp.structures import STAGES, Needs, VisualTokens

GRIDS = [(4, 4), (3, 5), (2, 9)]  # N even and odd, square and not
WIDTH = 8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INSIDE = {
    "dart",
    "learned_layers",
    "sparsevlm",
    "topv",
}  # of `LayerTokens`, unpadded: test_layer_contract.py
NAMES = [name for name in ocvtp.list_pruners() if name not in INSIDE]
ADAPTIVE = [name for name in NAMES if "adaptive" in pruner_class(name).budgets]
VARIANTS = {
    "fopru": {"strategy": "row"},
    "visionzip": {"guidance": "received"},
    "hiprune": {"alpha": 1.0},
    "vispruner": {"important_ratio": 0.0, "step": 3},
    "fps": {"space": "projected"},
    "kmeans": {"space": "projected"},
    "learned": {"choice": {"mmr": 0.5}},
    "greedyprune": {"tau": 0.1},
    "zspaprune": {"core_ratio": 1.0},
    "trimtokenator": {"first_ratio": 0.0},
    "holov": {"num_crops": 3},
    "prumerge": {"num_neighbours": 2},
    "ocvtp": {"choice": "one_to_one"},
    "ridge": {"weights": "none"},
    "scope": {"alpha": 0.5},
    "surprise": {"attention_power": 0.0, "balance": 1.0},
    "vflowopt": {"cell": 1},
    "vprune": {"group_side": 3, "bins": 4},
}
MORE = [*sorted(VARIANTS.items()), ("ocvtp", {"choice": "restore"})]
MORE += [("learned", {"choice": {"maxmin": 0.5}}), ("learned", {"scorer": "prompted"})]
CASES = [(name, {}) for name in NAMES]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


def build(name, num_keep, grid_hw=(4, 4), **settings):
    choice = {}
    if name == "ocvtp":
        choice = {"choice": settings.pop("choice", "winners")}
        choice["target_layer"] = -2 if choice["choice"] == "restore" else None
    if name == "learned":
        choice = {"scorer": settings.pop("scorer", "pointwise")}
    settings |= network_setting(name, WIDTH, grid_hw, **choice)
    return ocvtp.build_pruner(name, num_keep=num_keep, **settings)


def build_counting(name):
    """A pruner without a budget, where the method itself counts."""
    return build(name, None, **{"adaptive": True} if name == "learned" else {})


def make_tokens(needs: Needs, batch, grid_hw, seed=0, dtype=torch.float32, ragged=False):
    """Random visual tokens that hold just what `needs` names.

    Ragged ones end in padding: a few rows of the grid, of which every second image lacks one, and
    every third two.
    """
    count = grid_hw[0] * grid_hw[1]

    def draw(i, *shape):
        # one stream per image, so that an image is the same alone and in a batch
        rows = []
        for b in range(batch):
            generator = torch.Generator().manual_seed(1000 * seed + 20 * b + i)
            rows.append(torch.randn(*shape, generator=generator))
        return torch.stack(rows).to(dtype)

    def shares(i):
        return (2 * draw(i, count).float()).softmax(dim=1)

    lengths = torch.arange(batch)[:, None]
    parts = 1 + lengths % 2
    return VisualTokens(
        features=draw(0, count, WIDTH),
        grid_hw=grid_hw,
        valid=torch.arange(count) < real_counts(batch, grid_hw)[:, None] if ragged else None,
        cls=draw(1, WIDTH) if needs.cls else None,
        hidden={layer: draw(2, count, WIDTH) for layer in needs.hidden},
        attention={key: shares(11 + i) for i, key in enumerate(needs.attention)},
        keys={block: draw(4, count, WIDTH) for block in needs.keys},
        cls_keys={block: draw(5, WIDTH) for block in needs.keys},
        cls_queries={block: draw(6, WIDTH) for block in needs.keys},
        num_heads=2,
        projected=draw(7, count, WIDTH) if needs.projected else None,
        text=draw(8, 5, WIDTH) if needs.text else None,
        text_valid=torch.arange(5) < 5 - lengths % 3 if needs.text else None,
        clip_visual=draw(9, count, 4) if needs.clip else None,
        clip_text=draw(10, 2, 4) if needs.clip else None,
        clip_text_valid=torch.arange(2) < parts if needs.clip else None,
    )


def tokens_for(pruner, *sizes, **settings):
    """What a pruner reads; patches of 2 x 2 pixels in three colours if it looks at pixels."""
    tokens = make_tokens(pruner.needs, *sizes, **settings)
    if pruner.stage != "pixels":
        return tokens
    features = tokens.features
    return replace(tokens, features=torch.cat([64 * features, 99 * features[:, :, :4]], dim=2))


def real_counts(batch, grid_hw):
    rows = grid_hw[0] - torch.arange(batch) % min(3, grid_hw[0])
    return rows * grid_hw[1]


def image(tokens, b):
    return tokens.map(lambda t: t[b : b + 1])


def check_indices(selection, batch, num_keep, count, valid=None):
    keep = selection.keep_indices
    assert keep.shape[0] == batch
    assert keep.dtype == torch.int64
    for b in range(batch):
        real = keep[b] if selection.valid is None else keep[b][selection.valid[b]]
        present = count if valid is None else int(valid[b].sum())
        assert len(real) == min(num_keep, present)
        assert (real[1:] > real[:-1]).all(), "not ascending"
        assert real.min() >= 0
        assert real.max() < count
        if valid is not None:
            assert valid[b][real].all(), "kept a padding token"


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def expected(name, num_keep, count):
    return count if name == "none" else num_keep


def check_merge(pruner, selection, count):
    merge = selection.merge
    assert (merge is not None) <= pruner.merging
    if merge is None:
        return
    assert merge.shape == (*selection.keep_indices.shape, 1 + count)
    assert merge.isfinite().all()
    real = torch.ones_like(selection.keep_indices, dtype=torch.bool)
    real = real if selection.valid is None else selection.valid
    assert (merge != 0).any(dim=2).equal(real), "an empty row, or one for nothing"
    if selection.anchors is not None:
        for keep, anchors, kept in zip(
            selection.keep_indices, selection.anchors, real, strict=True
        ):
            assert keep[kept].tolist() == sorted(anchors[kept].tolist())


@pytest.mark.covering(2)
@pytest.mark.parametrize("grid_hw", GRIDS)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_exactly_k_ascending_indices(name, settings, grid_hw, ragged):
    count = grid_hw[0] * grid_hw[1]
    for num_keep in range(1, count + 1):
        pruner = build(name, num_keep, grid_hw, **settings)
        batch = 1 + num_keep % 5
        tokens = tokens_for(pruner, batch, grid_hw, ragged=ragged)
        selection = pruner.select(tokens)
        check_indices(selection, batch, expected(name, num_keep, count), count, tokens.valid)
        check_merge(pruner, selection, count)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("value", [1e19, float("inf"), float("nan")])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_k_ascending_indices_whatever_values_are_read(name, settings, value, ragged):
    pruner = build(name, 7, **settings)
    tokens = tokens_for(pruner, 2, (4, 4), ragged=ragged)

    def spoiled(values):
        return torch.where((torch.arange(16) % 3 == 0)[:, None], value * values.sign(), values)

    tokens = replace(
        tokens,
        features=spoiled(tokens.features),
        projected=None if tokens.projected is None else spoiled(tokens.projected),
        hidden={layer: spoiled(values) for layer, values in tokens.hidden.items()},
    )
    selection = pruner.select(tokens)
    check_indices(selection, 2, expected(name, 7, 16), 16, tokens.valid)


def test_keeping_all_keeps_every_place(name):
    pruner = build(name, 16)
    selection = pruner.select(tokens_for(pruner, 3, (4, 4)))
    assert selection.keep_indices.tolist() == [list(range(16))] * 3


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_batch_equals_its_images(name, settings, ragged):
    pruner = build(name, 5, **settings)
    tokens = tokens_for(pruner, 5, (4, 4), ragged=ragged)
    together = pruner.select(tokens)
    for b in range(5 if pruner.batch_invariant else 1):  # the first place is the same for all
        alone = pruner.select(image(tokens, b))
        assert_close(alone.keep_indices[0], together.keep_indices[b])
        if together.merge is not None:
            assert_close(alone.merge[0], together.merge[b])


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_padding_changes_nothing(name, settings):
    """An image with padding keeps what it keeps without it."""
    grid_hw = (6, 3)
    for num_keep in (1, 5, 9, 12):
        pruner = build(name, num_keep, grid_hw, **settings)
        tokens = tokens_for(pruner, 3, grid_hw, ragged=True)
        together = pruner.select(tokens)
        for b in range(3 if pruner.batch_invariant else 1):
            real = int(tokens.valid[b].sum())
            cut = image(tokens, b).map(
                lambda t: t[:, :real] if t.ndim > 1 and t.shape[1] == 18 else t  # noqa: B023
            )
            cut = replace(cut, valid=None, grid_hw=(real // 3, 3))
            alone = pruner.select(cut)
            kept = alone.keep_indices.shape[1]
            assert_close(together.keep_indices[b, :kept], alone.keep_indices[0])
            if together.merge is not None:
                assert_close(together.merge[b, :kept, : 1 + real], alone.merge[0])
                assert not together.merge[b, :, 1 + real :].any()


@pytest.mark.parametrize("name", NAMES)
def test_an_image_smaller_than_the_budget_is_left_alone(name):
    pruner = build(name, 14)
    tokens = tokens_for(pruner, 3, (4, 4), ragged=True)  # 16, 12 and 8 tokens
    selection = pruner.select(tokens)
    if name != "none":
        assert selection.counts().tolist() == [14, 12, 8]
    for b, count in ((1, 12), (2, 8)):
        assert selection.keep_indices[b, :count].tolist() == list(range(count))
        if selection.merge is not None:
            identity = torch.eye(16)[:count]
            assert_close(selection.merge[b, :count, 1:], identity)
            assert selection.merge[b, :, 0].abs().max() == 0


def test_repeatable_and_inputs_untouched(name):
    pruner = build(name, 5)
    for ragged in (False, True):
        tokens = tokens_for(pruner, 2, (4, 4), ragged=ragged)
        before = tokens.map(torch.clone)
        first, second = pruner.select(tokens), pruner.select(tokens)
        again = build(name, 5).select(tokens)
        for other in (second, again):
            assert torch.equal(first.keep_indices, other.keep_indices)
            assert first.merge is None or torch.equal(first.merge, other.merge)
        after = flatten(tokens)
        for key, tensor in flatten(before).items():
            assert torch.equal(after[key], tensor), key


def flatten(tokens):
    """Every tensor of visual tokens, by name."""
    found = {}
    for field in fields(tokens):
        value = getattr(tokens, field.name)
        if isinstance(value, dict):
            found |= {f"{field.name}/{key}": tensor for key, tensor in value.items()}
        elif isinstance(value, torch.Tensor):
            found[field.name] = value
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_half_precision_and_devices(name, settings, dtype, device):
    pruner = build(name, 5, **settings)
    tokens = tokens_for(pruner, 2, (4, 4), dtype=dtype).map(lambda t: t.to(device))
    selection = pruner.select(tokens)
    assert selection.keep_indices.device.type == device
    check_indices(selection, 2, expected(name, 5, 16), 16)
    check_merge(pruner, selection, 16)


def test_half_precision_keeps_what_fp32_keeps_of_the_same_values(name):
    """Scores are computed in fp32 whatever the tokens come in."""
    if name == "ocvtp":
        pytest.skip("its network runs in the precision of its weights")
    pruner = build(name, 5)
    tokens = tokens_for(pruner, 2, (4, 4), dtype=torch.bfloat16)
    exact = tokens.map(lambda t: t.float() if t.is_floating_point() else t)
    half, full = pruner.select(tokens), pruner.select(exact)
    assert torch.equal(half.keep_indices, full.keep_indices)
    assert half.merge is None or torch.equal(half.merge, full.merge)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_non_contiguous_inputs(name, settings):
    pruner = build(name, 5, **settings)
    tokens = tokens_for(pruner, 2, (4, 4), ragged=True)
    strided = tokens.map(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))
    assert_close(pruner.select(strided).keep_indices, pruner.select(tokens).keep_indices)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_all_equal_tokens(name, settings, value):
    """Constant relevance, no distances, a kernel of rank one or zero."""

    def flat(t):
        return torch.full_like(t, value) if t.is_floating_point() else t

    for num_keep in (1, 5, 15):
        pruner = build(name, num_keep, **settings)
        for ragged in (False, True):
            tokens = tokens_for(pruner, 2, (4, 4), ragged=ragged).map(flat)
            selection = pruner.select(tokens)
            check_indices(selection, 2, expected(name, num_keep, 16), 16, tokens.valid)
            assert selection.merge is None or selection.merge.isfinite().all()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_tokens_of_low_rank(name, settings):
    """More tokens than directions: duplicates, and K beyond the rank of any kernel."""

    def repeat(t):
        if not t.is_floating_point() or t.ndim != 3 or t.shape[1] != 64:
            return t
        return t[:, :3].repeat(1, 22, 1)[:, :64]

    for num_keep in (2, 31, 63):
        pruner = build(name, num_keep, (8, 8), **settings)
        tokens = tokens_for(pruner, 2, (8, 8)).map(repeat)
        selection = pruner.select(tokens)
        check_indices(selection, 2, expected(name, num_keep, 64), 64)
        check_merge(pruner, selection, 64)


def compiled(pruner, tokens):
    """`select` as one graph of tensors."""
    given = flatten(tokens)
    maps = ("hidden", "attention", "keys", "cls_keys", "cls_queries")
    keys = {name: list(getattr(tokens, name)) for name in maps}

    @torch.compile(fullgraph=True, backend="eager", dynamic=False)
    def select(given):
        plain = {name: value for name, value in given.items() if "/" not in name}
        held = {m: {key: given[f"{m}/{key}"] for key in keys[m]} for m in maps}
        made = VisualTokens(grid_hw=tokens.grid_hw, num_heads=2, **plain, **held)
        selection = pruner.select(made)
        return [
            t for t in (selection.keep_indices, selection.valid, selection.merge) if t is not None
        ]

    return select(given)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_one_graph(name, settings):
    """`select` compiles whole, with padding too: nothing in it depends on values."""
    pruner = build(name, 5, **settings)
    tokens = tokens_for(pruner, 2, (4, 4), ragged=True)
    selection = pruner.select(tokens)
    torch._dynamo.reset()
    with torch.no_grad():
        found = compiled(pruner, tokens)
    wanted = [
        t for t in (selection.keep_indices, selection.valid, selection.merge) if t is not None
    ]
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


class NoSync(TorchDispatchMode):
    """Raises at whatever makes the host wait for a device."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "item",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func.overloadpacket.__name__
        assert not any(op.startswith(word) for word in self.WAITS), f"{func} waits for the device"
        if op in ("index", "index_put", "index_put_"):
            dtypes = [index.dtype for index in args[1] if index is not None]
            assert torch.bool not in dtypes, f"{func} with a boolean mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_no_host_sync(name, settings, ragged):
    pruner = build(name, 5, **settings)
    tokens = tokens_for(pruner, 2, (4, 4), ragged=ragged)
    with NoSync():
        pruner.select(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTIVE)
def test_no_host_sync_where_the_method_counts(name):
    pruner = build_counting(name)
    tokens = tokens_for(pruner, 3, (6, 6), ragged=True)
    with NoSync():
        selection = pruner.select(tokens)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(compiled(pruner, tokens)[0], selection.keep_indices)


def test_the_guard_sees_syncs():
    x = torch.rand(4)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0.5], x.nonzero, lambda: bool(x.sum())):
        with pytest.raises(AssertionError, match="waits for the device"), NoSync():
            wait()


class NoCopyBetweenDevices(TorchDispatchMode):
    """Raises where numbers of the host are brought to a device, or the other way: both wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._thnn_fused_gru_cell:  # knows no fake numbers
            state = args[2]
            return torch.empty_like(state), state.new_empty(len(state), 5 * state.shape[1])
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            where = f"{source.device} to {made.device}"
            assert source.device == made.device, f"a copy from {where} waits for the device"
        return made


@pytest.mark.covering(1)
@pytest.mark.sampled(8)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_on_a_gpu_that_is_not_there(name, settings, ragged):
    """Shapes and devices alone: mixed devices, copies and values that the host reads raise."""
    with FakeTensorMode() as mode, torch.device("cuda:0"):
        pruner = build(name, 5, **settings)
    if isinstance(network := vars(pruner).get("network"), torch.nn.Module):
        assert {values.device.type for values in network.state_dict().values()} == {"cuda"}
        network.to = lambda device: network  # one of fake numbers cannot move, but is there already
    tokens = tokens_for(pruner, 2, (4, 4), ragged=ragged)
    with mode:
        there = tokens.map(lambda t: mode.from_tensor(t).to("cuda:0"))
        with NoCopyBetweenDevices():
            selection = pruner.select(there)
    found = [value for value in vars(selection).values() if value is not None]
    assert {value.device.type for value in found} == {"cuda"}


def test_the_guards_see_what_a_gpu_refuses():
    with FakeTensorMode() as mode:
        there = mode.from_tensor(torch.rand(4)).to("cuda:0")
        here = mode.from_tensor(torch.rand(4))
        copies = (
            lambda: torch.tensor([1, 2], device="cuda:0"),
            lambda: torch.tensor(0.5, device="cuda:0"),
            there.cpu,
            lambda: there.copy_(here),
            lambda: there.new_tensor([3]),
        )
        for copy in copies:
            with (
                pytest.raises(AssertionError, match="waits for the device"),
                NoCopyBetweenDevices(),
            ):
                copy()
        for wrong in (lambda: there + here, lambda: torch.where(there > 0, there, here)):
            with pytest.raises(RuntimeError, match=r"[Dd]evice"):
                wrong()
        for read in (there.sum().item, lambda: there[there > 0.5], lambda: bool(there.sum())):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                read()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_counts(name, ragged):
    """Without a budget, every image keeps as many as it needs; a budget with it is a cap."""
    for seed in range(5):
        pruner = build_counting(name)
        assert not pruner.exact
        tokens = tokens_for(pruner, 5, (6, 6), seed=seed, ragged=ragged)
        selection = pruner.select(tokens)
        check_merge(pruner, selection, 36)
        counts = selection.counts()
        for b in range(5):
            alone = pruner.select(image(tokens, b))
            assert counts[b] == alone.counts()[0] >= 1
            assert_close(alone.keep_indices[0], selection.keep_indices[b])
            if pruner.merging:
                assert_close(alone.merge[0], selection.merge[b])
            real = 36 if tokens.valid is None else int(tokens.valid[b].sum())
            assert counts[b] <= real
            check_indices(
                alone, 1, int(counts[b]), 36, None if not ragged else tokens.valid[b : b + 1]
            )
        capped = build(name, 3, adaptive=True).select(tokens)
        assert_close(capped.counts(), counts.clamp(max=3))
        check_merge(pruner, capped, 36)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_adaptive_on_equal_tokens(name, value):
    pruner = build_counting(name)
    tokens = tokens_for(pruner, 2, (4, 4)).map(
        lambda t: torch.full_like(t, value) if t.is_floating_point() else t
    )
    selection = pruner.select(tokens)
    assert selection.counts().min() >= 1
    assert not pruner.merging or selection.merge.isfinite().all()


def cut(tokens, b, grid_hw):
    """One image of a batch, without its padding."""
    real, count = int(tokens.real[b].sum()), tokens.num_tokens
    one = image(tokens, b).map(lambda t: t[:, :real] if t.shape[1:2] == (count,) else t)
    return replace(one, valid=None, grid_hw=(real // grid_hw[1], grid_hw[1]))


def rows_of(selection, b, count):
    """What the language model reads of an image: places, and weights over CLS and tokens."""
    valid = torch.ones_like(selection.keep_indices) if selection.valid is None else selection.valid
    keep = selection.keep_indices[b][valid[b].bool()]
    if selection.merge is None:
        return keep.tolist(), torch.eye(1 + count)[1 + keep]
    rows = selection.merge[b][valid[b].bool()]
    assert not rows[:, 1 + count :].any(), "read padding"
    return keep.tolist(), rows[:, : 1 + count]


SPARED = [(name, {}) for name in NAMES] + [(name, {"adaptive": True}) for name in ADAPTIVE]


@pytest.mark.parametrize("num_keep", [8, 9, 13, 15, 16, 17, 40])
@pytest.mark.parametrize(("name", "settings"), SPARED)
def test_small_images_are_kept_alone_as_in_a_batch(name, settings, num_keep):
    """Those that have fewer tokens than `num_keep` stay as they are."""
    pruner = build(name, num_keep, **settings)
    tokens = tokens_for(pruner, 3, (4, 4), ragged=True)  # 16, 12 and 8 tokens
    together = pruner.select(tokens)
    for b in range(3):
        alone = cut(tokens, b, (4, 4))
        count = alone.num_tokens
        if not pruner.batch_invariant and num_keep <= count and b:
            continue
        keep, rows = rows_of(pruner.select(alone), 0, count)
        assert rows_of(together, b, count)[0] == keep
        assert_close(rows_of(together, b, count)[1], rows)
        assert pruner.budget(count) == (count if name == "none" else min(num_keep, count))
        if num_keep > count and pruner.exact:
            assert keep == list(range(count))
            assert rows.equal(torch.eye(1 + count)[1:])


@pytest.mark.parametrize("name", ADAPTIVE)
def test_images_of_few_tokens_count_as_alone(name):
    """The sum of what is not kept never stands on padding, however many the method keeps."""
    for seed in range(20):
        pruner = build_counting(name)
        tokens = tokens_for(pruner, 3, (3, 1), ragged=True, seed=seed)  # 3, 2 and 1 tokens
        together = pruner.select(tokens)
        for b in range(3):
            keep, rows = rows_of(pruner.select(cut(tokens, b, (3, 1))), 0, 3 - b)
            assert rows_of(together, b, 3 - b)[0] == keep
            assert_close(rows_of(together, b, 3 - b)[1], rows)


def test_prumerge_plus_has_no_more_rows_than_tokens():
    """Where the official code keeps all N and adds the sum of no others, one of N is that sum."""
    keys = torch.zeros(1, 16, WIDTH)
    keys[0, [3, 7, 9, 15], 0] = 9.0  # outliers, a quarter of all: every token is kept beside them
    query = torch.eye(WIDTH)[:1]
    more = {"cls_keys": {-1: 0 * query}, "cls_queries": {-1: query}}
    tokens = VisualTokens(torch.randn(1, 16, WIDTH), (4, 4), keys={-1: keys}, **more)
    for cap, counted in ((None, 16), (16, 16), (40, 16), (15, 15)):
        selection = ocvtp.build_pruner("prumerge_plus", num_keep=cap, adaptive=True).select(tokens)
        assert selection.counts().tolist() == [counted]
        check_merge(ocvtp.build_pruner("prumerge_plus"), selection, 16)


def test_missing_needs_are_named(name):
    pruner = build(name, 5)
    if pruner.needs == Needs():
        return
    bare = VisualTokens(features=torch.randn(1, 16, WIDTH), grid_hw=(4, 4))
    with pytest.raises(
        ValueError, match=f"'{name}' needs .*(hidden|attention|keys|projected|text|clip)"
    ):
        pruner.select(bare)


@pytest.mark.parametrize("name", ocvtp.list_pruners())
def test_declarations(name):
    cls = pruner_class(name)
    assert cls.stage in STAGES
    assert cls.status in ("official", "unofficial", "control")
    assert inspect.getfile(cls).endswith(f"{name}.py")
    facts = entry(name)
    for fact in ("title", "reads", "status"):
        assert fact in vars(cls), f"{name}: the class lacks {fact!r}"
    assert re.fullmatch(r"[^\n:]+: [^\n]+\.", facts.title)
    assert re.fullmatch(r"-|[^\n.]+[^\n. ]", facts.needs)
    assert (facts.needs == "-") <= (build(name, 5).tower_needs == Needs()), "it reads something"
    text = inspect.getdoc(cls)
    for line in ("Paper: ", "Deviations: ", "num_keep: "):
        assert line in text, f"{name}: docstring lacks {line!r}"
    assert facts.paper is None or facts.paper in text
    assert (cls.status == "unofficial") == ("unofficial" in text.lower())
    assert len(inspect.getsource(inspect.getmodule(cls)).splitlines()) <= 150
