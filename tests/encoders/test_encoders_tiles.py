"""The tower of LLaVA-NeXT as a training encoder: tokens as the host shows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import LlavaNextImageProcessor

from ocvtp import Needs
from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.encoders.tiles import TiledEncoder
from ocvtp.hosts.base import Tiling
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.registry import find_host

TINY = "random:tiny"
SIZES = [(90, 140), (300, 101), (64, 64), (40, 260), (97, 9)]  # heights and widths
NEEDS = Needs(hidden=(3, -2), attention=((1, "received"), (2, "cls")), keys=(1,))


def pictures(sizes=SIZES):
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), np.uint8))
        .resize((width, height))
        for height, width in sizes
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model_and_processor():
    return load_model("random:tiny-llava-next")


@pytest.fixture(scope="module")
def folder(model_and_processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("next")
    for part in model_and_processor:
        part.save_pretrained(path)
    return str(path)


def encode(encoder, sizes=SIZES):
    return encoder([encoder.transform(picture) for picture in pictures(sizes)], sizes)


def shown_by_the_host(model, processor, budget):
    host = find_host(model, Tiling(budget=budget))
    images = processor.image_processor(images=pictures(), return_tensors="pt")
    hooks = host.install(NEEDS)
    with torch.no_grad():
        tokens = host.encode(dict(images), NEEDS).tokens
    for hook in hooks:
        hook.remove()
    return tokens


@pytest.mark.parametrize("random", [True, False])
def test_joint_tokens_are_those_that_the_host_shows(model_and_processor, folder, random):
    tokens = encode(TiledEncoder(TINY if random else folder, layer=3).load(NEEDS))
    shown = shown_by_the_host(*model_and_processor, "per_image")
    real = tokens.valid
    assert real.equal(shown.valid)
    assert not real.all()
    for name in ("hidden", "attention", "keys"):
        for key, values in getattr(shown, name).items():
            found = getattr(tokens, name)[key]
            assert_close(found[real], values[real], rtol=1e-4, atol=1e-4)
            assert (found[~real] == 0).all()
    for name in ("cls_keys", "cls_queries"):
        assert_close(getattr(tokens, name)[1], getattr(shown, name)[1], rtol=1e-4, atol=1e-4)
    assert tokens.grids.shape == (5, 2, 2)
    assert tokens.grids[:, 0].tolist() == [[12, 12]] * 5
    assert tokens.grids.prod(dim=2).sum(dim=1).equal(real.sum(dim=1))


def test_tiles_apart_are_those_that_the_host_shows(model_and_processor):
    tokens = encode(TiledEncoder(TINY, layer=3, slots="per_tile").load(NEEDS))
    shown = shown_by_the_host(*model_and_processor, "per_tile")
    counts = [len(load) for load in (TiledEncoder(TINY, 3).transform(p) for p in pictures())]
    first = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    others = torch.tensor([i for i in range(sum(counts)) if i not in first])
    # no tile is padding alone here, so that the host shows all
    assert len(shown.valid) == sum(counts)
    order = torch.cat([first, others])  # ours: all base views first
    real = tokens.valid
    assert real.equal(shown.valid[order])
    assert not real.all()
    assert tokens.grids is None
    assert tokens.grid_hw == (12, 12)
    assert_close(tokens.hidden[3][real], shown.hidden[3][order][real], rtol=1e-4, atol=1e-4)
    assert_close(tokens.cls_keys[1], shown.cls_keys[1][order], rtol=1e-4, atol=1e-4)


def test_a_tile_of_padding_alone_is_left_out(tmp_path):
    sides = {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}}
    processor = LlavaNextImageProcessor(**sides, image_grid_pinpoints=[[96, 288]])
    processor.save_pretrained(tmp_path)
    encoder = TiledEncoder(TINY, layer=1, slots="per_tile", processor=str(tmp_path))
    encoder.load(Needs(hidden=(1,)))
    sizes = [(300, 60), (60, 180)]  # of three tiles side by side the first fills two columns
    tokens = encode(encoder, sizes)
    assert tokens.valid.sum(dim=1).tolist() == [144, 144, 24, 144, 144, 144]
    pixels = [encoder.transform(picture) for picture in pictures(sizes)]
    whole = CLIPEncoder(TINY, layer=1).load(Needs(hidden=(1,)))
    tiles = torch.stack([pixels[0][0], pixels[1][0], pixels[0][2], *pixels[1][1:]])
    expected = whole(tiles).features.masked_fill(~tokens.valid[:, :, None], 0.0)
    assert_close(tokens.features, expected)


def test_siglip_towers_are_cut_into_tiles_too():
    settings = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64}
    settings |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    settings |= {"image_size": 56, "patch_size": 14}
    encoder = TiledEncoder(settings, layer=2).load(Needs(hidden=(2,)))
    tokens = encode(encoder, [(90, 140), (64, 64)])
    assert tokens.grids.tolist() == [[[4, 4], [6, 8]], [[4, 4], [8, 8]]]
    assert tokens.features.shape == (2, 80, 32)
    assert encoder.max_tokens == 80


def test_an_image_alone_is_encoded_as_in_a_batch():
    encoder = TiledEncoder(TINY, layer=2).load(Needs(hidden=(2,)))
    together = encode(encoder)
    pixels = [encoder.transform(picture) for picture in pictures()]
    for i, size in enumerate(SIZES):
        single = encoder([pixels[i]], [size])
        own = together.features[i, together.valid[i]]
        assert_close(single.features[0], own, rtol=1e-4, atol=1e-4)


def test_masks_are_of_the_base_view():
    transform = TiledEncoder(TINY, layer=1).transform
    ids = np.zeros((90, 140), dtype=np.uint8)
    ids[20:50, 40:90] = 200
    picture = Image.fromarray(np.repeat(ids[:, :, None], 3, axis=2))
    seen = transform.denormalize(transform(picture))[0, 0] * 255
    found = transform.instance_map(ids)
    assert found.shape == seen.shape == (96, 96)
    assert set(found.unique().tolist()) == {0, 200}
    assert ((found - seen).abs() > 100).float().mean() < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": "tile"}, "slots='tile'; pass 'joint' or 'per_tile'"),
        ({"tower": "/nowhere"}, "neither a folder"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        TiledEncoder(**{"tower": TINY, "layer": 1} | settings)


def test_a_processor_without_tiles_is_refused(tmp_path):
    from ocvtp.random_models.clip_config import plain_processor

    plain_processor(96).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="CLIPImageProcessor.* does not cut images into tiles"):
        TiledEncoder(TINY, layer=1, processor=str(tmp_path))


def test_sizes_are_wanted():
    encoder = TiledEncoder(TINY, layer=1).load(Needs(hidden=(1,)))
    pixels = [encoder.transform(picture) for picture in pictures()]
    for sizes in (None, SIZES[:2]):
        with pytest.raises(ValueError, match="5 images in tiles, image_sizes="):
            encoder(pixels, sizes)


def test_a_tower_of_one_size_refuses_tiles(folder):
    encoder = CLIPEncoder(folder, layer=1).load(Needs(hidden=(1,)))
    pixels = [encoder.transform(picture) for picture in pictures()]
    for images in (pixels, torch.stack([pixels[0], pixels[0]])):
        with pytest.raises(ValueError, match=r"made images of shape \[\(.*an encoder of tiles"):
            encoder(images)
