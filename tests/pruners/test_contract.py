"""What every registered pruner must keep to."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.testing import assert_close

import ocvtp
from ocvtp.pruners import pruner_class
from ocvtp.pruners.catalog import entry
from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.structures import STAGES, Needs, VisualTokens

GRIDS = [(4, 4), (3, 5), (2, 9)]  # N even and odd, square and not
WIDTH = 8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def build(name, num_keep, grid_hw=(4, 4)):
    settings = {}
    if name == "ocvtp":
        torch.manual_seed(0)
        config = OCPrunerConfig(
            feature_dim=WIDTH, hidden_dim=16, slot_dim=4, ffn_dim=8, grid_hw=grid_hw, layer=3
        )
        settings["network"] = OCPruner(config).eval()
    return ocvtp.build_pruner(name, num_keep=num_keep, **settings)


def make_tokens(needs: Needs, batch, grid_hw, seed=0, dtype=torch.float32, ragged=False):
    """Random visual tokens that hold just what `needs` names."""
    count = grid_hw[0] * grid_hw[1]

    def draw(i, *shape):
        # one stream per image, so that an image is the same alone and in a batch
        rows = []
        for b in range(batch):
            generator = torch.Generator().manual_seed(1000 * seed + 10 * b + i)
            rows.append(torch.randn(*shape, generator=generator))
        return torch.stack(rows).to(dtype)

    attention = {
        key: draw(3, count).float().softmax(dim=1) for i, key in enumerate(needs.attention)
    }
    valid = None
    if ragged:
        valid = (
            torch.arange(count) < torch.tensor([count - 3 * (b % 3) for b in range(batch)])[:, None]
        )
    return VisualTokens(
        features=draw(0, count, WIDTH),
        grid_hw=grid_hw,
        valid=valid,
        cls=draw(1, WIDTH) if needs.cls else None,
        hidden={layer: draw(2, count, WIDTH) for layer in needs.hidden},
        attention=attention,
        keys={block: draw(4, count, WIDTH) for block in needs.keys},
        cls_keys={block: draw(5, WIDTH) for block in needs.keys},
        cls_queries={block: draw(6, WIDTH) for block in needs.keys},
        num_heads=2,
        projected=draw(7, count, WIDTH) if needs.projected else None,
        text=draw(8, 5, WIDTH) if needs.text else None,
        clip_visual=draw(9, count, 4) if needs.clip else None,
        clip_text=draw(10, 1, 4) if needs.clip else None,
    )


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


@pytest.fixture(params=ocvtp.list_pruners())
def name(request):
    return request.param


def expected(name, num_keep, count):
    return count if name == "none" else num_keep


@pytest.mark.parametrize("grid_hw", GRIDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_exactly_k_ascending_indices(name, grid_hw, ragged):
    count = grid_hw[0] * grid_hw[1]
    for num_keep in (1, 2, count // 2, count - 1, count):
        pruner = build(name, num_keep, grid_hw)
        for batch in (1, 5):
            tokens = make_tokens(pruner.needs, batch, grid_hw, ragged=ragged)
            selection = pruner.select(tokens)
            check_indices(selection, batch, expected(name, num_keep, count), count, tokens.valid)


def test_keeping_all_is_the_identity(name):
    pruner = build(name, 16)
    selection = pruner.select(make_tokens(pruner.needs, 3, (4, 4)))
    assert selection.keep_indices.tolist() == [list(range(16))] * 3
    assert selection.merge is None or pruner.merging


@pytest.mark.parametrize("ragged", [False, True])
def test_a_batch_equals_its_images(name, ragged):
    pruner = build(name, 5)
    tokens = make_tokens(pruner.needs, 3, (4, 4), ragged=ragged)
    together = pruner.select(tokens)
    for b in range(3 if pruner.batch_invariant else 1):  # the first place is the same for all
        alone = pruner.select(image(tokens, b))
        assert_close(alone.keep_indices[0], together.keep_indices[b])


def test_repeatable_and_inputs_untouched(name):
    pruner = build(name, 5)
    tokens = make_tokens(pruner.needs, 2, (4, 4))
    before = tokens.map(torch.clone)
    first, second = pruner.select(tokens), pruner.select(tokens)
    assert torch.equal(first.keep_indices, second.keep_indices)
    assert torch.equal(build(name, 5).select(tokens).keep_indices, first.keep_indices)
    for field in ("features", "projected"):
        assert_close(getattr(tokens, field), getattr(before, field), rtol=0, atol=0)
    for layer in tokens.hidden:
        assert_close(tokens.hidden[layer], before.hidden[layer], rtol=0, atol=0)
    for key in tokens.attention:
        assert_close(tokens.attention[key], before.attention[key], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_devices(name, dtype, device):
    pruner = build(name, 5)
    tokens = make_tokens(pruner.needs, 2, (4, 4), dtype=dtype).map(lambda t: t.to(device))
    selection = pruner.select(tokens)
    assert selection.keep_indices.device.type == device
    check_indices(selection, 2, expected(name, 5, 16), 16)


def test_non_contiguous_inputs(name):
    pruner = build(name, 5)
    tokens = make_tokens(pruner.needs, 2, (4, 4))
    strided = tokens.map(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))
    assert_close(pruner.select(strided).keep_indices, pruner.select(tokens).keep_indices)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_equal_tokens(name, value):
    pruner = build(name, 5)
    tokens = make_tokens(pruner.needs, 2, (4, 4)).map(lambda t: torch.full_like(t, value))
    check_indices(pruner.select(tokens), 2, expected(name, 5, 16), 16)


def test_no_host_sync(name):
    """`select` compiles into one graph: nothing in it waits for the device."""
    pruner = build(name, 5)
    tokens = make_tokens(pruner.needs, 2, (4, 4))
    fields = {"hidden": tokens.hidden, "attention": tokens.attention}

    @torch.compile(fullgraph=True, backend="eager")
    def select(features, hidden, attention):
        return pruner._select(
            VisualTokens(features, (4, 4), hidden=hidden, attention=attention),
            pruner.budget(features.shape[1]),
        ).keep_indices

    with torch.no_grad():
        compiled = select(tokens.features, fields["hidden"], fields["attention"])
        assert_close(compiled, pruner.select(tokens).keep_indices)


def test_a_budget_beyond_the_image_is_refused(name):
    if name == "none":
        assert build(name, 17).budget(16) == 16
        return
    pruner = build(name, 17)
    with pytest.raises(ValueError, match="num_keep=17 exceeds the 16 visual tokens.*at most 16"):
        pruner.select(make_tokens(pruner.needs, 1, (4, 4)))


def test_missing_needs_are_named(name):
    pruner = build(name, 5)
    if pruner.needs == Needs():
        return
    bare = VisualTokens(features=torch.randn(1, 16, WIDTH), grid_hw=(4, 4))
    with pytest.raises(ValueError, match=f"'{name}' needs .*(hidden|attention)"):
        pruner.select(bare)


def test_declarations(name):
    cls = pruner_class(name)
    assert cls.stage in STAGES
    assert cls.status in ("official", "unofficial", "control")
    assert inspect.getfile(cls).endswith(f"{name}.py")
    facts = entry(name)
    text = inspect.getdoc(cls)
    for line in ("Paper: ", "Stage: ", "Deviations: ", "num_keep: "):
        assert line in text, f"{name}: docstring lacks {line!r}"
    assert facts.paper is None or facts.paper in text
    assert (cls.status == "unofficial") == ("unofficial" in text.lower())
    assert len(inspect.getsource(inspect.getmodule(cls)).splitlines()) <= 120
