"""Frozen towers: cut, loaded from anywhere, and equal to the whole tower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    DINOv3ViTImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.encoders.timm import TimmEncoder
from ocvtp.hosts.loading import load_model
from ocvtp.random_models.clip_config import RANDOM_TOWERS, random_tower, vision_config
from ocvtp.structures import Needs
from ocvtp.towers.families import look
from ocvtp.transformers_names import packed_images

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


DINOS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
KINDS = (
    "clip",
    "tower",
    "siglip",
    "siglip2",
    "llava",
    *DINOS,
    "llava of DINOv2",
    "llava of DINOv3",
)


def dino_config(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 14}
    sizes |= {"intermediate_size": 64, "num_register_tokens": 4} if kind == DINOS[2] else {}
    return AutoConfig.for_model(kind, **sizes, image_size=70, initializer_range=0.2)


@torch.no_grad()
def dino(kind):
    """A tower for 70 pixels, none of whose tokens or scales are alike."""
    tower = AutoModel.from_config(dino_config(kind)).eval()
    for name, weight in tower.named_parameters():
        if "token" in name or "lambda" in name:
            weight.normal_(std=0.5)
    return tower


def dino_llava(kind):
    """A LLaVA around such a tower."""
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=9,
                       num_attention_heads=1)  # fmt: skip
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=dino_config(kind), text_config=text, image_token_id=8)
    )
    llava.model.vision_tower.load_state_dict(dino(kind).state_dict())
    return llava.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models of every kind, and the tower inside each."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION)).eval()
    siglip = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).eval()
    llava, processor = load_model("random:tiny-llava")
    vision = VISION | {"num_patches": 16}
    siglip2 = Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=vision)).eval()
    llavas = {name: dino_llava(kind) for name, kind in zip(KINDS[-2:], DINOS[1:], strict=True)}
    made = {
        "siglip2": (siglip2, siglip2.vision_model),
        **{kind: (tower, tower) for kind, tower in ((kind, dino(kind)) for kind in DINOS)},
        **{name: (model, model.model.vision_tower) for name, model in llavas.items()},
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
        elif name == "siglip2":
            Siglip2ImageProcessor(patch_size=14, max_num_patches=16).save_pretrained(root / name)
        elif name == "dinov2":
            BitImageProcessor(**sizes).save_pretrained(root / name)
        elif name == "dinov3_vit":
            DINOv3ViTImageProcessor(size=sizes["crop_size"]).save_pretrained(root / name)
        else:
            CLIPImageProcessor(**sizes).save_pretrained(root / name)
    return {name: (str(root / name), tower) for name, (_, tower) in made.items()}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_tower_equals_the_whole_one(folders, kind):
    """DINO towers are given images of 56 pixels, not of the 70 that their settings name."""
    path, tower = folders[kind]
    encoder = CLIPEncoder(path, layer=3)
    has_cls = "siglip" not in kind
    wanted = ((1, "received"), (-4, "given"), *[(1, "cls")] * has_cls)
    encoder.load(Needs(hidden=(3, -5), attention=wanted, keys=(0,)))
    assert len(look(encoder.tower).blocks) == 3
    assert not any(p.requires_grad for p in encoder.parameters())
    image = Image.new("RGB", (90, 60), (200, 30, 60))
    pixels = torch.stack([encoder.transform(image), torch.randn(encoder.transform(image).shape)])
    tokens = encoder(pixels)
    tower.set_attn_implementation("eager")
    whole = in_whole(tower, pixels)
    first = encoder.num_prefix
    registers = 4 if "registers" in kind or "3" in kind or "llava of" in kind else 0
    assert first == has_cls + registers
    assert tokens.grid_hw == encoder.grid_hw
    assert tokens.features.shape[1] == encoder.max_tokens == (144 if kind == "llava" else 16)
    for layer in (3, -5):
        assert_close(tokens.hidden[layer], whole.hidden_states[layer][:, first:])
    maps = [a.mean(dim=1) for a in whole.attentions]
    assert_close(tokens.attention[1, "received"], maps[1].mean(dim=1)[:, first:])
    assert_close(tokens.attention[-4, "given"], maps[-4][:, first:, first:].mean(dim=2))
    assert tokens.keys[0].shape == tokens.features.shape
    if has_cls:
        assert_close(tokens.attention[1, "cls"], maps[1][:, 0, first:], rtol=1e-5, atol=1e-6)


def in_whole(tower, pixels):
    """What a tower gives of images [B, 3, H, W], with all its states and maps."""
    given = {"pixel_values": pixels}
    if tower.config.model_type == "siglip2_vision_model":
        patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14)  # [B, 3, rows, columns, 14, 14]
        shapes = torch.tensor([[*patches.shape[2:4]]] * len(pixels))
        patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(len(pixels), -1, 14 * 14 * 3)
        mask = torch.ones(patches.shape[:2]).long()
        given = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return tower(**given, output_hidden_states=True, output_attentions=True)


def test_images_for_siglip2_are_cut_as_its_own_processor_cuts_them(folders):
    """Of a square: there both make the same of it."""
    path, _ = folders["siglip2"]
    encoder = CLIPEncoder(path, layer=1)
    picture = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    image = Image.fromarray(picture)
    own = Siglip2ImageProcessor.from_pretrained(path)(images=image, return_tensors="pt")
    made = packed_images(encoder.transform(image)[None], 14)
    assert own.keys() == made.keys()
    for name, value in made.items():
        assert_close(value, own[name], check_dtype=False)


@pytest.mark.parametrize("name", [n for n in RANDOM_TOWERS if n.startswith("tiny")])
def test_tiny_towers_of_every_kind(name):
    encoder = CLIPEncoder(f"random:{name}", layer=2).load(Needs(hidden=(2,), keys=(1,)))
    tokens = encoder(torch.randn(2, 3, 96, 96))
    assert tokens.features.shape == (2, 144, 64)
    assert tokens.keys[1].shape == (2, 144, 64)
    assert encoder.grid_hw == (12, 12)


@pytest.mark.parametrize("kind", DINOS)
def test_dino_towers_of_other_sizes(folders, kind):
    """The picture is larger and shows the same part of the image."""
    path, tower = folders[kind]
    plain, encoder = CLIPEncoder(path, layer=3), CLIPEncoder(path, layer=3, img_size=84)
    assert (plain.grid_hw, encoder.grid_hw, encoder.patch_size) == ((4, 4), (6, 6), 14)
    encoder.load(Needs(hidden=(3,), cls=True))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    pixels = encoder.transform(image)[None]
    assert pixels.shape == (1, 3, 84, 84)
    seen = encoder(pixels)
    whole = in_whole(tower, pixels).hidden_states[3]
    assert_close(seen.features, whole[:, encoder.num_prefix :])
    assert_close(seen.cls, whole[:, 0])
    rows, columns = np.indices((60, 90))
    for ids in (rows, columns):
        small, large = (
            one.transform.instance_map(ids.astype(np.uint8)).numpy() for one in (plain, encoder)
        )
        corners = [(m[0, 0], m[-1, -1]) for m in (small, large)]
        assert np.abs(np.subtract(*corners)).max() <= 1
    assert plain.transform(image).shape == (3, 56, 56)


def test_sizes_that_towers_do_not_take(folders, tmp_path):
    with pytest.raises(ValueError, match=r"img_size=60 is no multiple of the 14 pixels .* or 70"):
        CLIPEncoder(folders["dinov2"][0], layer=1, img_size=60)
    for kind in ("clip", "siglip", "siglip2"):
        with pytest.raises(ValueError, match="img_size=84, but the tower .* sees 56 pixels and no"):
            CLIPEncoder(folders[kind][0], layer=1, img_size=84)
        assert CLIPEncoder(folders[kind][0], layer=1, img_size=56).grid_hw == (4, 4)
    sizes = {"size": {"height": 56, "width": 84}, "do_center_crop": False}
    CLIPImageProcessor(**sizes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"img_size=112, but .* makes pictures of \(112, 168\)"):
        CLIPEncoder(folders["dinov2"][0], layer=1, processor=str(tmp_path), img_size=112)


def test_processors_that_make_images_of_several_sizes(folders, tmp_path):
    path, _ = folders["dinov2"]
    CLIPImageProcessor(size={"shortest_edge": 56}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"several sizes, e\.g\. \[56, 84\] and \[84, 56\] pix"):
        CLIPEncoder(path, layer=1, processor=str(tmp_path))


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


@pytest.mark.parametrize(
    ("tower", "num_prefix"),
    [("vit_small_patch14_reg4_dinov2", 5), ("vit_small_patch16_dinov3", 5),
     ("vit_base_patch16_reg4_gap_256", 4), ("vit_base_patch16_rope_reg1_gap_256", 1)],
)  # fmt: skip
def test_timm_registers_are_no_tokens(tower, num_prefix):
    """Attention is that of timm's own, turned or not, without renewed sums."""
    args = {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 112}
    encoder = TimmEncoder(tower, layer=1, pretrained=False, model_args=args)
    assert encoder.num_prefix == num_prefix
    has_cls = num_prefix == 5
    kinds = [(1, "received"), (1, "given"), *[(1, "cls")] * has_cls]
    encoder.load(Needs(hidden=(1,), attention=tuple(kinds), keys=(1,)))
    attention, kept = encoder.tower.blocks[1].attn, []
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda m, a, weights: kept.append(weights.mean(1)))
    tokens = encoder(torch.randn(2, 3, 112, 112) * 3)
    (weights,) = kept
    assert_close(tokens.attention[1, "received"], weights.mean(1)[:, num_prefix:])
    expected = weights[:, num_prefix:, num_prefix:].mean(2)
    assert_close(tokens.attention[1, "given"], expected)
    assert bool(tokens.cls_keys) == has_cls
    if has_cls:
        assert_close(tokens.attention[1, "cls"], weights[:, 0, num_prefix:])
        return
    encoder.load(Needs(hidden=(1,), attention=((1, "cls"),)))
    with pytest.raises(ValueError, match="no CLS token"):
        encoder(torch.randn(1, 3, 112, 112))


def test_timm_refuses_what_is_no_vit():
    with pytest.raises(ValueError, match="no plain vision transformer"):
        TimmEncoder("resnet18", layer=1, pretrained=False)
    with pytest.raises(ValueError, match="similar names"):
        TimmEncoder("vit_tiny_patch16_999", layer=1, pretrained=False)


@pytest.mark.parametrize("size", [(120, 80), (64, 200), (96, 96)])
@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dinov2", "dinov3_vit", "timm"])
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
        *(CLIPEncoder(folders[k][0], layer=1).transform for k in ("clip", "siglip2", *DINOS)),
        TimmEncoder("vit_tiny_patch16_224", layer=1, pretrained=False).transform,
    ):
        assert json.loads(json.dumps(transform.describe())) == transform.describe()
