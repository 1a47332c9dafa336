"""Frozen towers: cut, loaded from anywhere, and equal to the whole tower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.encoders.timm import TimmEncoder
from ocvtp.hosts.loading import load_model
from ocvtp.random_models.clip_config import random_tower, vision_config
from ocvtp.structures import Needs

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 16,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "projection_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models of four kinds, and the tower inside each."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION)).eval()
    siglip = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).eval()
    llava, processor = load_model("random:tiny-llava")
    made = {
        "clip": (clip, clip.vision_model),
        "tower": (clip.vision_model, clip.vision_model),
        "siglip": (siglip, siglip.vision_model),
        "llava": (llava, llava.model.vision_tower),
    }
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    for name, (model, _) in made.items():
        model.save_pretrained(root / name)
        if name == "llava":
            processor.save_pretrained(root / name)
        elif name == "siglip":
            SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(root / name)
        else:
            CLIPImageProcessor(**sizes).save_pretrained(root / name)
    return {name: (str(root / name), tower) for name, (_, tower) in made.items()}


@pytest.mark.parametrize("kind", ["clip", "tower", "siglip", "llava"])
def test_a_cut_tower_equals_the_whole_one(folders, kind):
    path, tower = folders[kind]
    encoder = CLIPEncoder(path, layer=3).load(
        Needs(hidden=(3, -5), attention=((1, "received"), (-4, "given")), keys=(0,))
    )
    assert len(encoder.tower.encoder.layers) == 3
    assert not any(p.requires_grad for p in encoder.parameters())
    size = tower.config.image_size
    pixels = torch.randn(2, 3, size, size)
    tokens = encoder(pixels)
    tower.set_attn_implementation("eager")
    whole = tower(pixels, output_hidden_states=True, output_attentions=True)
    first = encoder.num_prefix
    assert first == (0 if kind == "siglip" else 1)
    assert tokens.grid_hw == encoder.grid_hw
    for layer in (3, -5):
        assert_close(tokens.hidden[layer], whole.hidden_states[layer][:, first:])
    maps = [a.mean(dim=1) for a in whole.attentions]
    assert_close(tokens.attention[1, "received"], maps[1].mean(dim=1)[:, first:])
    assert_close(tokens.attention[-4, "given"], maps[-4][:, first:, first:].mean(dim=2))
    assert tokens.keys[0].shape == tokens.features.shape


def test_cls_attention(folders):
    path, tower = folders["clip"]
    encoder = CLIPEncoder(path, layer=2).load(Needs(hidden=(2,), attention=((1, "cls"),)))
    pixels = torch.randn(2, 3, 56, 56)
    tower.set_attn_implementation("eager")
    expected = tower(pixels, output_attentions=True).attentions[1].mean(dim=1)[:, 0, 1:]
    assert_close(encoder(pixels).attention[1, "cls"], expected)


def test_the_cls_of_keys_and_attention_among_patches(folders):
    path, tower = folders["clip"]
    depth = len(tower.encoder.layers)
    wanted = ((2 - depth, "received"),)
    encoder = CLIPEncoder(path, layer=2)
    encoder.load(Needs(hidden=(2,), attention=wanted, keys=(2 - depth,), patch_queries=True))
    pixels = torch.randn(2, 3, 56, 56)
    tokens = encoder(pixels)
    tower.set_attn_implementation("eager")
    whole = tower(pixels, output_attentions=True, output_hidden_states=True)
    maps = whole.attentions[2].mean(dim=1)
    assert_close(tokens.attention[wanted[0]], maps[:, 1:].mean(dim=1)[:, 1:])
    layer = tower.encoder.layers[2]
    states = layer.layer_norm1(whole.hidden_states[2])
    for projection, found in (("k_proj", tokens.cls_keys), ("q_proj", tokens.cls_queries)):
        expected = getattr(layer.self_attn, projection)(states)[:, 0]
        assert_close(found[2 - depth], expected)


def test_cls_attention_is_refused_without_a_cls(folders):
    encoder = CLIPEncoder(folders["siglip"][0], layer=2)
    encoder.load(Needs(hidden=(2,), attention=((1, "cls"),)))
    with pytest.raises(ValueError, match="no CLS token.*`received`"):
        encoder(torch.randn(1, 3, 56, 56))


def test_random_towers_are_reproducible_and_leave_the_generator_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    config = vision_config("random:tiny")
    one, two = random_tower(config, 3).state_dict(), random_tower(config, 3).state_dict()
    assert_close(one, two, rtol=0, atol=0)
    assert torch.equal(before, torch.random.get_rng_state())
    other = random_tower(config, 4).state_dict()
    name = "encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(one[name], other[name])


def test_a_cut_random_tower_is_the_head_of_the_whole_one():
    encoder = CLIPEncoder("random:tiny", layer=2).load(Needs(hidden=(2,)))
    pixels = torch.randn(1, 3, 96, 96)
    whole = random_tower(vision_config("random:tiny"), 0).eval()(pixels, output_hidden_states=True)
    assert_close(encoder(pixels).hidden[2], whole.hidden_states[2][:, 1:])


def test_the_tiny_host_has_the_tiny_tower():
    encoder = CLIPEncoder("random:tiny", layer=3).load(Needs(hidden=(3,)))
    tower = load_model("random:tiny-llava")[0].model.vision_tower.state_dict()
    for name, value in encoder.tower.state_dict().items():
        assert_close(value, tower[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    needs = Needs(hidden=(3,), attention=((-2, "received"),))
    half = CLIPEncoder("random:tiny", layer=3, dtype=dtype).load(needs)
    full = CLIPEncoder("random:tiny", layer=3).load(needs)
    pixels = torch.rand(2, 3, 96, 96)
    tokens, exact = half(pixels), full(pixels)
    assert next(half.tower.parameters()).dtype == getattr(torch, dtype)
    assert tokens.hidden[3].dtype == torch.float32
    spread = exact.hidden[3].std()
    assert (tokens.hidden[3] - exact.hidden[3]).abs().mean() < 0.02 * spread


def test_it_stays_in_evaluation_mode():
    encoder = CLIPEncoder("random:tiny", layer=1).load(Needs(hidden=(1,))).train()
    assert not encoder.training
    assert not encoder.tower.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tower": "random:huge"}, "random towers are"),
        ({"tower": "/no/such/folder"}, "neither a folder"),
        ({"tower": {"model_type": "llama"}}, "is a llama.*TimmEncoder"),
        ({"tower": "random:tiny", "layer": 7}, r"hidden_states\[7\].*-7 to 6"),
        ({"tower": "random:tiny", "dtype": "int8"}, "bfloat16"),
        ({"tower": "random:tiny", "layer": 1, "processor": "/no"}, "no image processor"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CLIPEncoder(**settings)


def test_incomplete_weights_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(f"{folders['tower'][0]}/model.safetensors")
    state.pop(next(k for k in state if "layers.1.mlp.fc1.weight" in k))
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(open(f"{folders['tower'][0]}/{name}").read())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights"):
        CLIPEncoder(str(tmp_path), layer=3).load(Needs(hidden=(3,)))


@pytest.mark.parametrize("tower", ["vit_tiny_patch16_224", "vit_base_patch16_rope_reg1_gap_256"])
def test_timm(tower):
    needs = Needs(hidden=(2, -2), attention=((1, "received"),))
    args = {"embed_dim": 48, "num_heads": 3, "depth": 4}
    encoder = TimmEncoder(tower, layer=2, pretrained=False, model_args=args).load(needs)
    assert len(encoder.tower.blocks) == 3
    height, width = encoder.transform.settings["input_size"][1:]
    pixels = torch.randn(2, 3, height, width)
    tokens = encoder(pixels)
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = timm.create_model(tower, pretrained=False, num_classes=0, **args).eval()
    features = whole.forward_intermediates(
        pixels, indices=4, norm=False, output_fmt="NLC", intermediates_only=True
    )
    assert_close(tokens.hidden[2], features[1], rtol=1e-4, atol=1e-4)
    assert_close(tokens.hidden[-2], features[2], rtol=1e-4, atol=1e-4)
    assert tokens.features.shape[1] == encoder.grid_hw[0] * encoder.grid_hw[1]
    assert_close(tokens.attention[1, "received"].sum(), torch.tensor(2.0), rtol=0.2, atol=0)


def test_timm_attention_equals_a_softmax_by_hand():
    encoder = TimmEncoder("vit_tiny_patch16_224", layer=2, pretrained=False)
    encoder.load(Needs(hidden=(2,), attention=((1, "received"), (1, "cls"))))
    kept = {}
    block = encoder.tower.blocks[1].attn
    block.qkv.register_forward_hook(lambda m, a, o: kept.update(qkv=o))
    tokens = encoder(torch.randn(1, 3, 224, 224))
    q, k, _ = kept["qkv"].unflatten(-1, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    assert_close(tokens.attention[1, "received"], weights.mean(1)[:, 1:])
    assert_close(tokens.attention[1, "cls"], weights[:, 0, 1:])


def test_timm_refuses_what_is_no_vit():
    with pytest.raises(ValueError, match="no plain vision transformer"):
        TimmEncoder("resnet18", layer=1, pretrained=False)
    with pytest.raises(ValueError, match="similar names"):
        TimmEncoder("vit_tiny_patch16_999", layer=1, pretrained=False)


@pytest.mark.parametrize("size", [(120, 80), (64, 200), (96, 96)])
@pytest.mark.parametrize("kind", ["clip", "siglip", "timm"])
def test_masks_go_through_the_same_geometry_as_images(folders, kind, size):
    if kind == "timm":
        transform = TimmEncoder("vit_tiny_patch16_224", layer=1, pretrained=False).transform
    else:
        transform = CLIPEncoder(folders[kind][0], layer=1).transform
    ids = np.zeros(size, dtype=np.uint8)
    ids[size[0] // 4 : size[0] // 2, size[1] // 3 : size[1] // 2] = 200
    picture = Image.fromarray(np.repeat(ids[:, :, None], 3, axis=2))
    seen = transform.denormalize(transform(picture))[0] * 255
    found = transform.instance_map(ids)
    assert found.dtype == torch.int64
    assert found.shape == seen.shape
    assert set(found.unique().tolist()) <= {0, 200}
    assert ((seen > 100) != (found == 200)).float().mean() < 0.03
    assert (found == 200).float().mean() > 0.01


def test_descriptions_are_plain_json(folders):
    import json

    for transform in (
        CLIPEncoder(folders["clip"][0], layer=1).transform,
        TimmEncoder("vit_tiny_patch16_224", layer=1, pretrained=False).transform,
    ):
        assert json.loads(json.dumps(transform.describe())) == transform.describe()
