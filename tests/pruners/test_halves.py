"""Later stages of methods that begin before the language model, and how they are listed."""

from __future__ import annotations

from dataclasses import replace

import naive_halves as naive
import pytest
import torch
from torch.testing import assert_close

import ocvtp
from ocvtp.pruners import catalog
from ocvtp.pruners.layer_pruner import LayerNeeds, LayerStage
from ocvtp.structures import LayerTokens, VisualTokens


def tower(batch=1, count=576, valid=None):
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(batch, count, generator=generator).softmax(dim=1)
    return VisualTokens(
        torch.zeros(batch, count, 4),
        (1, count),
        valid,
        attention={(-2, "received"): attention, (-1, "cls"): attention},
        keys={-2: torch.randn(batch, count, 8, generator=generator)},
        num_heads=2,
        projected=torch.randn(batch, count, 6, generator=generator),
    )


def inside(batch=3, count=35, layer=4, kind="visual", seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, count, generator=generator).softmax(dim=1)
    return LayerTokens(
        features=torch.randn(batch, count, 6, generator=generator),
        grid_hw=(1, count),
        places=torch.arange(count).repeat(batch, 1),
        attention={(layer - 1, kind): scores},
        keys={layer - 1: torch.randn(batch, count, 12, generator=generator)},
        num_heads=3,
    )


def kinds(selection):
    """How many tokens are dominant, and how many are means."""
    members = (selection.merge[0] != 0).sum(dim=1)
    return int((members == 1).sum()), int((members > 1).sum())


# ------------------------------------------------------------------------------------- VisionDrop


def visiondrop(**settings):
    return ocvtp.build_pruner("visiondrop", later=True, **settings)


@pytest.mark.parametrize("budget", [{"num_keep": 32}, {"keep_ratio": 32 / 576}])
def test_visiondrops_published_counts(budget):
    first, later = visiondrop(**budget).parts
    assert kinds(first.select(tower())) == (42, 6)
    assert later.schedule(32, 48) == (LayerStage(8, 35), LayerStage(16, 26), LayerStage(24, 19))
    for left, split in ((35, (30, 5)), (26, (22, 4)), (19, (16, 3))):
        assert kinds(later.select_at(inside(count=200), 4, left)) == split  # none without company
    assert (48 + 35 + 26 + 19) / 4 == 32


@pytest.mark.parametrize(("num_layers", "num_keep"), [(32, 64), (28, 100), (40, 300), (32, 576)])
def test_visiondrops_budget_is_an_average(num_layers, num_keep):
    first, later = visiondrop(num_keep=num_keep).parts
    before = first.select(tower()).keep_indices.shape[1]
    assert before == min(576, round(1.5 * num_keep))
    counts = [stage.num_keep for stage in later.schedule(num_layers, before)]
    assert (before + sum(counts)) / 4 == pytest.approx(num_keep, abs=0.5)


def test_visiondrops_first_stage_alone_is_the_default():
    pruner = ocvtp.build_pruner("visiondrop", num_keep=48)
    assert pruner.parts == (pruner,)
    assert kinds(pruner.select(tower())) == (42, 6)
    with pytest.raises(ValueError, match="those inside; pass later=True"):
        ocvtp.build_pruner("visiondrop", num_keep=48, stages=((1, 5),))
    with pytest.raises(ValueError, match="ascending layers"):
        visiondrop(num_keep=48, stages=((2, 5), (1, 9)))


def test_visiondrops_stages():
    first, later = visiondrop(num_keep=40, stages=((3, 20), (5, 0.25))).parts
    assert first.select(tower()).keep_indices.shape[1] == 40
    assert later.schedule(8, 40) == (LayerStage(3, 20), LayerStage(5, 10))


@pytest.mark.parametrize("num_keep", [1, 4, 9, 19, 34, 35])
def test_visiondrop_merges_by_keys(num_keep):
    _, later = visiondrop(num_keep=32).parts
    assert later.needs_at(4) == LayerNeeds(attention=((3, "visual"),), keys=(3,))
    tokens = inside()
    selection = later.select_at(tokens, 4, num_keep)
    if num_keep == 35:
        assert selection.merge is None
        return
    for b in range(3):
        keys = tokens.keys[3][b].unflatten(1, (3, 4)).mean(dim=1)
        scores = tokens.attention[3, "visual"][b].tolist()
        rows = naive.dominant_and_contextual(scores, keys, num_keep)
        assert selection.anchors[b].tolist() == [anchor for anchor, _ in rows]
        for row, (_, weights) in zip(selection.merge[b, :, 1:], rows, strict=True):
            assert row.nonzero()[:, 0].tolist() == sorted(weights)
            assert_close(row[list(weights)], torch.tensor(list(weights.values())))


def test_the_first_half_leaves_small_images_alone():
    first, _ = visiondrop(num_keep=32).parts
    valid = torch.arange(60) < torch.tensor([[60], [48], [20]])
    selection = first.select(tower(3, 60, valid))
    assert selection.counts().tolist() == [48, 48, 20]
    assert selection.keep_indices[2, :20].tolist() == list(range(20))
    for num_keep, count, kept in ((61, 60, 60), (32, 47, 47), (32, 49, 48)):
        alone = visiondrop(num_keep=num_keep).parts[0].select(tower(1, count))
        assert alone.counts().tolist() == [kept]
        assert (alone.merge is None) == (kept == count)  # as it is
    with pytest.raises(ValueError, match="'visiondrop' needs attention"):
        first.select(replace(tower(), attention={}))


# ------------------------------------------------------------------------------------------ ToDRE


def test_todre_drops_images_that_the_text_does_not_look_at():
    pruner = ocvtp.build_pruner("todre", num_keep=20, later=True)
    first, later = pruner.parts
    assert first.select(tower()).keep_indices.equal(pruner.select(tower()).keep_indices)
    assert later.schedule(32, 20) == (LayerStage(28, 20),)
    assert later.layers(28) == (24,)
    assert later.needs_at(28) == LayerNeeds(attention=((27, "text"),))
    tokens = inside(layer=28, kind="text", count=20)
    shares = torch.tensor([[0.099], [0.101], [0.5]])
    tokens = replace(tokens, attention={(27, "text"): shares * tokens.attention[27, "text"]})
    selection = later.select_at(tokens, 28, 20)
    assert selection.keep_indices.tolist() == [list(range(20))] * 3
    assert selection.valid.all(dim=1).tolist() == [False, True, True]
    assert selection.valid.any(dim=1).tolist() == [False, True, True]


def test_todres_settings():
    pruner = ocvtp.build_pruner("todre", num_keep=20)
    assert pruner.parts == (pruner,)
    with pytest.raises(ValueError, match="threshold=1.5; pass a share of attention, 0 to 1"):
        ocvtp.build_pruner("todre", num_keep=20, later=True, threshold=1.5)


# ------------------------------------------------------------------------------------ the catalogue


@pytest.mark.parametrize("name", ["vitcop", "vflowopt"])
def test_both_stages_are_listed(name):
    assert catalog.entry(name).stage == "llm_input + llm_layers"
    parts = ocvtp.build_pruner(name, num_keep=5).parts
    assert [part.stage for part in parts] == ["llm_input", "llm_layers"]
    assert [part.name for part in parts] == [name, name]
    assert f"| `{name}` | " in catalog.markdown_table()
    assert catalog.entry(name).merges


def test_no_fact_is_read_from_a_docstring(monkeypatch):
    table = catalog.markdown_table()
    for name in ocvtp.list_pruners():
        monkeypatch.setattr(ocvtp.pruners.pruner_class(name), "__doc__", None)
    assert catalog.markdown_table() == table
