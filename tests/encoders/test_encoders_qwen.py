"""The tower of Qwen2.5-VL as a training encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import Qwen2VLImageProcessor

from ocvtp import Needs, build_pruner
from ocvtp.encoders.qwen import QwenEncoder, patches
from ocvtp.hosts.loading import load_model

TINY = "random:tiny-qwen2.5-vl"


@pytest.fixture(scope="module")
def model_and_processor():
    return load_model(TINY)


@pytest.fixture(scope="module")
def folder(model_and_processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen")
    model_and_processor[0].save_pretrained(path)
    return str(path)


def test_patches_are_those_of_the_processor():
    pixels = np.random.default_rng(0).integers(0, 255, (112, 168, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=10**6)
    theirs = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    image = (torch.tensor(pixels).permute(2, 0, 1) / 255 - mean) / std

    class Sizes:
        spatial_merge_size, patch_size, temporal_patch_size = 2, 14, 2

    assert_close(patches(image[None], Sizes), theirs["pixel_values"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 2, 5, -2])
def test_tokens_are_those_that_the_host_shows(model_and_processor, folder, layer):
    """A square image through the encoder, cut, and through the whole model with a pruner."""
    from ocvtp.hosts.registry import find_host

    model, _ = model_and_processor
    encoder = QwenEncoder(folder, layer=layer, image_size=140).load(Needs(hidden=(layer,)))
    pixels = torch.randn(2, 3, 140, 140)
    tokens = encoder(pixels)
    assert tokens.grid_hw == (5, 5)
    assert tokens.hidden[layer].shape == (2, 25, 64)
    assert len(encoder.tower.blocks) == max(1, layer % 7)
    host, needs = find_host(model), Needs(hidden=(layer,))
    images = {
        "pixel_values": patches(pixels, model.config.vision_config),
        "image_grid_thw": torch.tensor([[1, 10, 10]] * 2),
    }
    hooks = host.install(needs)
    with torch.no_grad():
        shown = host.encode(images, needs).tokens
    for hook in hooks:
        hook.remove()
    assert_close(tokens.hidden[layer], shown.hidden[layer])
    assert tokens.grid_hw == shown.grid_hw


SHAPES = [(90, 140), (300, 101), (64, 640), (20, 20), (111, 112)]  # heights and widths


def pictures():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in SHAPES]


def test_images_keep_their_shape_as_the_processor_makes_them():
    encoder = QwenEncoder(TINY, layer=1, min_pixels=56 * 56, max_pixels=40 * 28 * 28)
    processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=40 * 28 * 28)
    assert encoder.max_tokens == 40
    for picture in pictures():
        theirs = processor(images=[picture], return_tensors="pt")
        ours = encoder.transform(picture)
        assert [1, ours.shape[1] // 14, ours.shape[2] // 14] == theirs["image_grid_thw"][0].tolist()
        packed = patches(ours[None], encoder._config)
        assert_close(packed, theirs["pixel_values"], rtol=1e-4, atol=1e-4)
        ids = np.asarray(picture)[:, :, 0]
        assert encoder.transform.instance_map(ids).shape == ours.shape[1:]
    said = encoder.transform.describe()
    assert said["image_processor_type"] == "Qwen2VLImageProcessor"
    assert (said["min_pixels"], said["max_pixels"]) == (56 * 56, 40 * 28 * 28)
    assert "size" not in said


def test_a_batch_of_any_grids_is_what_the_host_shows(model_and_processor, folder):
    from ocvtp.hosts.registry import find_host

    model, _ = model_and_processor
    needs = Needs(hidden=(3, 5))
    encoder = QwenEncoder(folder, layer=3, max_pixels=40 * 28 * 28).load(needs)
    pixels = [encoder.transform(picture) for picture in pictures()]
    tokens = encoder(pixels)
    units = [[image.shape[1] // 28, image.shape[2] // 28] for image in pixels]
    assert tokens.grids[:, 0].tolist() == units
    assert tokens.valid.sum(dim=1).tolist() == [rows * columns for rows, columns in units]
    host, config = find_host(model), model.config.vision_config
    images = {
        "pixel_values": torch.cat([patches(image[None], config) for image in pixels]),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in units]),
    }
    hooks = host.install(needs)
    with torch.no_grad():
        shown = host.encode(images, needs).tokens
    for hook in hooks:
        hook.remove()
    assert tokens.valid.equal(shown.valid)
    for layer in needs.hidden:
        assert_close(tokens.hidden[layer], shown.hidden[layer])
    for i, image in enumerate(pixels):
        single = encoder(image[None])
        assert single.grid_hw == tuple(units[i])
        assert single.valid is None
        assert single.grids is None
        own = tokens.features[i, tokens.valid[i]]
        assert_close(single.features[0], own, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_network_trains_on_it_and_prunes(tmp_path, coco_folder, monkeypatch):
    from ocvtp.training.run import train

    config = Path("configs/train/qwen2_5_vl_7b.yaml").resolve()
    words = ["--config", str(config), "--data.root", str(Path(coco_folder).resolve())]
    monkeypatch.chdir(tmp_path)  # where its logs go
    words += ["--model.encoder.tower", TINY, "--model.encoder.layer", "3"]
    words += ["--model.encoder.image_size", "112", "--model.encoder.dtype", "float32"]
    words += [
        "--trainer.max_steps",
        "2",
        "--trainer.precision",
        "32-true",
        "--data.batch_size",
        "2",
    ]
    words += ["--trainer.default_root_dir", str(tmp_path), "--data.num_workers", "0"]
    words += ["--model.num_slots", "[4]", "--model.val_num_slots", "4"]
    result = train(words)
    from ocvtp.export import export_checkpoint

    export_checkpoint(result.last or result.best, tmp_path / "artifact")
    pruner = build_pruner("ocvtp", num_keep=4, checkpoint=str(tmp_path / "artifact"))
    model, processor = load_model(TINY)
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>"
    picture = Image.fromarray(np.zeros((112, 168, 3), dtype=np.uint8))
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    seen = []
    with pruner(model, on_prune=seen.append):
        model.generate(**inputs, max_new_tokens=2)
    assert seen[0].selection.counts().tolist() == [4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tower": "random:nothing"}, "random towers are"),
        ({"tower": "/nowhere"}, "neither a folder"),
        ({"tower": TINY, "layer": 3, "image_size": 100}, "image_size=100; pass a multiple of 28"),
        ({"tower": TINY, "layer": 9}, r"hidden_states\[9\] does not exist"),
        ({"tower": TINY, "layer": 3, "max_pixels": 3000}, "min_pixels=3136, max_pixels=3000; pass"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        QwenEncoder(**settings)


def test_only_hidden_states_are_supplied():
    encoder = QwenEncoder(TINY, layer=3, image_size=56)
    with pytest.raises(ValueError, match="hidden states alone"):
        encoder.load(Needs(hidden=(3,), keys=(2,)))
