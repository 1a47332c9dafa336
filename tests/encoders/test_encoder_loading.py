"""Towers by name: which encoder serves a name, at which size and layer, and what is refused."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from tiny_timm import SIZES, tiny_timm
from torch.testing import assert_close

from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.encoders.loading import build_encoder, source_of
from ocvtp.encoders.timm import TimmEncoder
from ocvtp.hosts.loading import load_model
from ocvtp.random_models.clip_config import plain_processor, random_tower, vision_config
from ocvtp.structures import Needs


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A tiny ViT as timm writes it: patches of 14 pixels, weights for 56 of them."""
    folder = tmp_path_factory.mktemp("timm") / "tower"
    tiny_timm(folder)
    return folder


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    """A LLaVA that reads the last layer of its tower."""
    folder = tmp_path_factory.mktemp("llava")
    model, processor = load_model("random:tiny-llava")
    model.config.vision_feature_layer = -1
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_names_of_timm(timm_folder):
    for name in (f"local-dir:{timm_folder}", str(timm_folder), f"timm:local-dir:{timm_folder}"):
        encoder = build_encoder(name)
        assert isinstance(encoder, TimmEncoder)
        assert (encoder.grid_hw, encoder.feature_dim, encoder.patch_size) == ((4, 4), 32, 14)
        assert encoder.layer == 2  # of 0..3
        assert encoder.has_cls
    for name in ("vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"):
        encoder = build_encoder(name, layer=1, img_size=64)
        assert (encoder.grid_hw, encoder.layer) == ((4, 4), 1)


def test_another_size_reads_the_same_weights(timm_folder):
    encoder = build_encoder(f"local-dir:{timm_folder}", img_size=84).load(Needs(hidden=(-2,)))
    assert encoder.grid_hw == (6, 6)
    torch.manual_seed(0)
    own = timm.create_model("vit_small_patch14_dinov2", **SIZES)
    assert_close(encoder.tower.patch_embed.proj.weight, own.patch_embed.proj.weight)
    tokens = encoder(torch.randn(2, 3, 84, 84))
    assert tokens.features.shape == (2, 36, 32)


def test_names_of_transformers(llava_folder):
    encoder = build_encoder("random:tiny")
    assert isinstance(encoder, CLIPEncoder)
    assert (encoder.grid_hw, encoder.patch_size, encoder.layer) == ((12, 12), 8, 5)
    assert build_encoder(str(llava_folder)).layer == 6  # the one that its language model reads
    assert build_encoder(str(llava_folder), layer=-2).layer == 5
    assert build_encoder("random:tiny", img_size=96).grid_hw == (12, 12)


@pytest.mark.parametrize(
    ("name", "num_prefix", "has_cls"),
    [
        ("tiny-dinov2", 1, True),
        ("tiny-dinov2-with-registers", 5, True),
        ("tiny-dinov3", 5, True),
        ("tiny-siglip2", 0, False),
    ],
)
def test_dino_and_siglip2_of_transformers(name, num_prefix, has_cls, tmp_path):
    encoder = build_encoder(f"random:{name}")
    assert (encoder.num_prefix, encoder.has_cls, encoder.patch_size) == (num_prefix, has_cls, 8)
    assert (encoder.layer, encoder.grid_hw) == (5, (12, 12))
    random_tower(vision_config(f"random:{name}"), seed=0).save_pretrained(tmp_path)
    plain_processor(64 if num_prefix else 96).save_pretrained(tmp_path)
    saved = build_encoder(str(tmp_path))
    assert isinstance(saved, CLIPEncoder)
    assert saved.grid_hw == ((8, 8) if num_prefix else (12, 12))
    sized = build_encoder(str(tmp_path), img_size=96).load(Needs(hidden=(5,)))
    pixels = torch.randn(1, 3, 96, 96)
    assert_close(sized(pixels).features, encoder.load(Needs(hidden=(5,)))(pixels).features)


def test_the_cls_is_that_of_the_first_layer(timm_folder):
    for name in (str(timm_folder), "random:tiny"):
        encoder = build_encoder(name)
        pixels = torch.randn(2, 3, *(side * encoder.patch_size for side in encoder.grid_hw))
        seen = encoder.load(Needs(hidden=(1, 2), cls=True))(pixels)
        record = {}
        blocks = encoder.tower.blocks if name != "random:tiny" else encoder.tower.encoder.layers
        blocks[0].register_forward_hook(lambda *a, record=record: record.update(out=a[2]))
        encoder(pixels)
        out = record["out"]
        assert_close(seen.cls, (out[0] if isinstance(out, tuple) else out)[:, 0])
        assert_close(seen.features, seen.hidden[1])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (60, r"img_size=60 is no multiple of the 14 pixels .* e\.g\. 56 or 70"),
        (9, r"img_size=9 is no multiple of the 14 pixels .* e\.g\. 14 or 28"),
        (0, "img_size=0 counts pixels"),
        (-14, "img_size=-14 counts pixels"),
    ],
)
def test_sizes_that_patches_do_not_divide_are_refused(timm_folder, size, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(f"local-dir:{timm_folder}", img_size=size)


def test_what_is_no_tower_is_refused(tmp_path, timm_folder):
    with pytest.raises(ValueError, match="img_size=112, but the tower 'random:tiny' sees 96"):
        build_encoder("random:tiny", img_size=112)
    with pytest.raises(ValueError, match=r"timm cannot make 'local-dir:/nowhere' .*local-dir:PATH"):
        build_encoder("local-dir:/nowhere")
    with pytest.raises(ValueError, match=r"hidden_states\[4\] does not exist"):
        build_encoder(str(timm_folder), layer=4)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a bert"):
        build_encoder(str(tmp_path))
    with pytest.raises(ValueError, match="timm cannot make 'local-dir:.*KeyError"):
        build_encoder(f"local-dir:{tmp_path}")


def test_a_tower_without_a_cls_refuses_what_reads_one():
    encoder = build_encoder("vit_base_patch16_siglip_224", img_size=32)
    assert not encoder.has_cls
    for needs in (Needs(cls=True), Needs(attention=((0, "cls"),)), Needs(cls_queries=(0,))):
        with pytest.raises(ValueError, match="reads the CLS token, which the tower timm:vit_base"):
            encoder.check(needs)
    encoder.check(Needs(attention=((0, "received"),), keys=(1,)))
    with pytest.raises(ValueError, match=r"blocks\[99\] does not exist"):
        encoder.check(Needs(keys=(99,)))


def test_registers_are_no_cls():
    encoder = build_encoder("vit_base_patch16_rope_reg1_gap_256")
    assert encoder.num_prefix == 1
    assert not encoder.has_cls


def test_weights_are_read_from(timm_folder):
    assert source_of(f"local-dir:{timm_folder}") == str(timm_folder)
    assert source_of("random:tiny") == "random:tiny"
