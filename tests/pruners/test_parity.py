"""Each method against reference vectors, made by the official code where there is any."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

import ocvtp
from ocvtp.structures import VisualTokens
from ocvtp.towers.taps import attention_mean


def select(name, tokens, **settings):
    return ocvtp.build_pruner(name, **settings).select(tokens)


def first(tokens):
    return tokens.map(lambda t: t[:1])


def indices(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


def flat(heads):
    """[B, H, S, d] -> [B, S, D]."""
    return heads.transpose(1, 2).flatten(2)


def mixed(selection, features, cls=None):
    """What a host makes of a merge matrix."""
    cls = torch.zeros_like(features[:, :1]) if cls is None else cls[:, None]
    return selection.merge @ torch.cat([cls, features], dim=1)


# FoPru


@pytest.fixture
def fopru(vectors):
    reference = vectors("fopru")
    q, k = flat(reference["q"]), flat(reference["k"])
    attention = {
        (-2, kind): attention_mean(q, k, 4, kind, 1, patch_queries=True)
        for kind in ("given", "received")
    }
    return reference, VisualTokens(torch.zeros(2, 36, 1), (6, 6), attention=attention)


def test_fopru_reads_the_means_of_the_patches(fopru):
    reference, tokens = fopru
    assert_close(tokens.attention[-2, "given"], reference["s1"])
    assert_close(tokens.attention[-2, "received"], reference["s2"])
    assert reference["picked_s1"].tolist() == [False, True]  # both branches


@pytest.mark.parametrize(
    ("strategy", "num_keep", "key"),
    [("rank", 9, "rank_idx_k9"), ("row", 12, "row_idx_r2"), ("row", 6, "row_idx_r1")],
)
def test_fopru(fopru, strategy, num_keep, key):
    reference, tokens = fopru
    kept = select("fopru", tokens, num_keep=num_keep, strategy=strategy).keep_indices
    assert kept.tolist() == reference[key].tolist()


# VisionZip


@pytest.fixture
def visionzip(vectors):
    reference = vectors("visionzip")
    q, k = flat(reference["q"]), flat(reference["k"])
    cls = attention_mean(q, k, 4, "cls", 1)
    assert_close(cls, reference["cls_attn"].mean(dim=1))
    hidden = reference["hidden"]
    return reference, VisualTokens(
        hidden[:, 1:],
        (8, 8),
        cls=hidden[:, 0],
        attention={(-2, "cls"): cls},
        keys={-2: k[:, 1:]},
        num_heads=4,
    )


@pytest.mark.parametrize(
    ("case", "settings"), [("a", {"num_keep": 16, "num_contextual": 6}), ("b", {"num_keep": 64})]
)
def test_visionzip(visionzip, case, settings):
    reference, tokens = visionzip
    selection = select("visionzip", tokens, **settings)
    assert_close(mixed(selection, tokens.features, tokens.cls), reference[f"out_{case}"])
    if case == "a":
        assert_close(selection.merge, reference["W_a"])
    dominant = reference[f"all_indices_{case}"][:, 1:].sort(dim=1).values - 1  # 0 is the CLS
    count = dominant.shape[1]
    assert selection.anchors[:, 1 : 1 + count].tolist() == dominant.tolist()
    for kept, always in zip(selection.keep_indices.tolist(), dominant.tolist(), strict=True):
        assert set(always) < set(kept)


# HiPrune


@pytest.mark.parametrize("total", [384, 256, 128])
def test_hiprune(vectors, total):
    reference = vectors("hiprune")
    attention = {
        (block, "received"): attention_mean(
            flat(reference[f"q_{part}"]), flat(reference[f"k_{part}"]), 2, "received", 1
        )
        for block, part in ((8, "obj"), (-2, "deep"))
    }
    assert_close(attention[8, "received"], reference["shallow_recv"])
    assert_close(attention[-2, "received"], reference["deep_recv"])
    tokens = VisualTokens(torch.zeros(2, 576, 1), (24, 24), attention=attention)
    kept = select("hiprune", tokens, num_keep=total // 2).keep_indices
    assert kept.tolist() == indices(reference[f"mask_retention{total}_B2"])


def test_hiprune_on_a_small_grid(vectors):
    reference = vectors("hiprune")
    received = {8: reference["small_shallow_recv"], -2: reference["small_deep_recv"]}
    tokens = VisualTokens(
        torch.zeros(1, 64, 1),
        (8, 8),
        attention={(block, "received"): scores for block, scores in received.items()},
    )
    kept = select("hiprune", tokens, num_keep=24, alpha=0.5).keep_indices
    assert kept.tolist() == indices(reference["small_mask"])


# TRIM


@pytest.fixture
def trim(vectors):
    reference = vectors("trim")
    features = reference["features"]
    normed = functional.layer_norm(
        features, (32,), reference["ln_weight"], reference["ln_bias"], 1e-5
    )
    return reference, VisualTokens(
        features,
        (8, 8),
        clip_visual=normed @ reference["visual_projection"].T,
        clip_text=reference["text_embeds"][:, None],
    )


def test_trim_with_a_fixed_number(trim):
    reference, tokens = trim
    selection = select("trim", tokens, num_keep=17)
    assert selection.anchors[:, :16].tolist() == reference["fixed_idx"].tolist()
    out = mixed(selection, tokens.features)
    assert_close(out, reference["fixed_out_fp16"].float(), rtol=1e-3, atol=1e-3)  # theirs is fp16
    kept = tokens.features.gather(1, reference["fixed_idx"][:, :, None].expand(-1, -1, 32))
    assert_close(out[:, :16], kept, rtol=0, atol=0)


def test_trim_prefers_the_nearest_if_told_to(trim):
    """Of a prompt that is turned round, the official sign keeps the same."""
    reference, tokens = trim
    turned = replace(tokens, clip_text=-reference["text_embeds"][:, None])
    selection = select("trim", turned, num_keep=17, nearest=True)
    assert selection.anchors[:, :16].tolist() == reference["fixed_idx"].tolist()


def test_trim_adaptive(trim):
    reference, tokens = trim
    selection = select("trim", first(tokens))
    assert selection.counts().tolist() == [12]
    assert selection.anchors[:, :11].tolist() == reference["adaptive_idx"].tolist()
    out = mixed(selection, tokens.features[:1])[:, :12]
    assert_close(out, reference["adaptive_out_fp16"].float(), rtol=1e-3, atol=1e-3)


# PruMerge


@pytest.fixture
def prumerge(vectors):
    reference = vectors("prumerge")
    hidden = reference["hidden"]
    q = hidden @ reference["Wq"].T + reference["bq"]
    k = hidden @ reference["Wk"].T + reference["bk"]
    return reference, VisualTokens(
        hidden[:, 1:],
        (8, 8),
        keys={-1: k[:, 1:]},
        cls_keys={-1: k[:, 0]},
        cls_queries={-1: q[:, 0]},
        num_heads=4,
    )


def test_prumerge_with_a_fixed_number(prumerge):
    reference, tokens = prumerge
    selection = select("prumerge", tokens, num_keep=9)
    assert selection.anchors[:, :8].tolist() == reference["fixed_idx"].tolist()
    assert_close(mixed(selection, tokens.features), reference["fixed_out"])


def test_prumerge_adaptive(prumerge):
    reference, tokens = prumerge
    selection = select("prumerge", first(tokens))
    assert selection.counts().tolist() == [13]
    assert selection.anchors[:, :12].tolist() == reference["adaptive_idx"].tolist()
    assert_close(selection.merge[:, :13, 1:], reference["adaptive_W"])
    assert_close(mixed(selection, tokens.features[:1])[:, :13], reference["adaptive_out"])


# DivPrune, VisPruner and the others


@pytest.mark.parametrize(("num_keep", "key"), [(16, "order_r0250"), (6, "order_r0098")])
def test_divprune(vectors, num_keep, key):
    projected = vectors("divprune")["tokens"][None]
    tokens = VisualTokens(torch.zeros(1, 64, 1), (8, 8), projected=projected)
    kept = select("divprune", tokens, num_keep=num_keep).keep_indices
    assert kept[0].tolist() == sorted(vectors("divprune")[key].tolist())


@pytest.mark.parametrize(("num_keep", "share"), [(16, 50), (17, 50), (32, 75), (16, 100)])
def test_vispruner(vectors, num_keep, share):
    reference = vectors("vispruner")
    cls = reference["cls_attn"].mean(dim=1)
    tokens = VisualTokens(reference["features"], (8, 8), attention={(-2, "cls"): cls})
    settings = {"num_keep": num_keep, "important_ratio": share / 100}
    kept = select("vispruner", tokens, **settings).keep_indices
    assert kept.tolist() == indices(reference[f"mask_k{num_keep}_r{share}"])
    if share == 100:
        assert select("fastervlm", tokens, num_keep=num_keep).keep_indices.equal(kept)


@pytest.fixture
def extras(vectors):
    reference = vectors("extras")
    tokens, cls = reference["tokens"], reference["cls_attn"]
    return reference, VisualTokens(
        tokens,
        (8, 8),
        attention={(-2, "cls"): cls, (-1, "cls"): cls},
        projected=tokens,
        text=reference["text_embeds"].expand(2, -1, -1),
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("scope", {}),
        ("zspaprune", {}),
        ("todre", {}),
        ("trimtokenator", {}),
        ("greedyprune", {"tau": 0.3}),
    ],
)
def test_greedy_methods(extras, name, settings):
    reference, tokens = extras
    kept = select(name, tokens, num_keep=16, **settings).keep_indices
    assert kept.tolist() == reference[f"{name}_order"].sort(dim=1).values.tolist()


def test_holov_where_the_official_code_does_not_pad(extras):
    reference, tokens = extras
    kept = select("holov", tokens, num_keep=16).keep_indices.tolist()
    padded, whole = reference["holov_idx"].tolist()
    assert -1 not in whole
    assert kept[1] == sorted(whole)
    # Where it pads, what it keeps is kept, and the places of the zero vectors are filled.
    assert padded.count(-1) == 3
    assert set(padded) - {-1} < set(kept[0])


def test_uniform(vectors):
    tokens = VisualTokens(torch.zeros(1, 576, 1), (24, 24))
    kept = select("uniform", tokens, num_keep=64).keep_indices
    assert kept[0].tolist() == vectors("extras")["uniform_idx_24x24_k64"].tolist()
