"""Which part of each visual token shows the objects of a question, on every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_question_prompts import NAMES, host

from ocvtp.hosts import find_host
from ocvtp.hosts.prompt.read_call import look
from ocvtp.structures import Needs
from ocvtp.training.object_masks import ObjectsOnTokens, _area_mean
from ocvtp.training.prompts import PromptTransform

pytestmark = pytest.mark.sampled(3)


def tokens_of(name, sizes):
    """The tokens of images of these widths and heights."""
    model, processor = host(name)
    ramps = [np.add.outer(np.linspace(0, 99, h), np.linspace(0, 150, w)) for w, h in sizes]
    images = [Image.fromarray(ramp.astype(np.uint8)).convert("RGB") for ramp in ramps]
    items = [
        {"image": image, "question": "What?", "answer": "That."}
        | {"before": (), "masks": None, "key": str(number)}
        for number, image in enumerate(images)
    ]
    adapter, inputs = find_host(model), PromptTransform(processor)(items)["inputs"]
    hooks = adapter.install(Needs())
    try:
        with torch.no_grad():
            return look(adapter, Needs(), inputs).encoded
    finally:
        for hook in hooks:
            hook.remove()


def shares(name, masks, encoded):
    model, processor = host(name)
    return ObjectsOnTokens(find_host(model), processor)(masks, encoded.tokens)


def box(size, left, top, right, bottom):
    mask = np.zeros(size[::-1], np.bool_)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("name", NAMES)
def test_left_half(name):
    """Square images: the whole view, and the tiles put together where there are some."""
    size = (224, 224)
    encoded = tokens_of(name, [size])
    found, there = shares(name, [box(size, 0, 0, 112, 224)], encoded)
    adapter = find_host(host(name)[0])
    expected = []
    grids = adapter.grids(encoded)
    for rows, columns in grids:
        line = np.clip(columns / 2 - np.arange(columns), 0, 1)
        expected.append(np.tile(line, (rows, 1)).flatten())
    if "internvl" in name and len(grids) > 1:  # four tiles of 4 x 4, then the thumbnail
        tile = np.repeat([[1.0], [0.0], [1.0], [0.0]], 16, axis=1).flatten()
        expected = [tile, expected[0]]
    assert found[0].numpy() == pytest.approx(np.concatenate(expected), abs=0.02)
    assert there.tolist() == [True]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_in_a_batch_are_as_they_are_alone(name):
    sizes = [(96, 96), (130, 60), (60, 130)]
    masks = [box((w, h), w // 3, h // 4, w // 2, h // 2) for w, h in sizes]
    encoded = tokens_of(name, sizes)
    together, there = shares(name, masks, encoded)
    real = encoded.tokens.real
    assert together.shape == real.shape
    assert not together[~real].any()
    assert there.all()
    for row, (size, mask) in enumerate(zip(sizes, masks, strict=True)):
        alone, _ = shares(name, [mask], tokens_of(name, [size]))
        assert together[row][real[row]].equal(alone[0])
        assert float(alone.min()) >= 0
        assert float(alone.max()) <= 1


@pytest.mark.parametrize("name", ["random:tiny-llava-next", "random:tiny-qwen3-vl"])
def test_a_model_that_is_looked_into_is_asked_for_sizes_too(name):
    size = (120, 100)
    mask, encoded = box(size, 10, 10, 60, 50), tokens_of(name, [size])
    expected, _ = shares(name, [mask], encoded)
    hooks = find_host(host(name)[0]).install(Needs(hidden=(1,), projected=True))
    try:
        found, _ = shares(name, [mask], encoded)
    finally:
        for hook in hooks:
            hook.remove()
    assert found.equal(expected)


def test_each_patch_is_counted():
    """The demo VLM: 12 x 12 patches of 8 pixels, and images that are not scaled."""
    random = np.random.default_rng(0)
    mask = random.random((96, 96)) < 0.3
    found, _ = shares("checkpoints/demo-vlm", [mask], tokens_of("checkpoints/demo-vlm", [(96, 96)]))
    expected = mask.reshape(12, 8, 12, 8).mean(axis=(1, 3)).flatten()
    assert found[0].numpy() == pytest.approx(expected, abs=1e-6)


def test_what_is_cropped_away_is_not_there():
    """The demo VLM crops the middle of images that are no squares."""
    size = (192, 96)
    masks = [box(size, 0, 0, 40, 96), box(size, 40, 0, 96, 96), None, box(size, 0, 0, 0, 0)]
    found, there = shares(
        "checkpoints/demo-vlm", masks, tokens_of("checkpoints/demo-vlm", [size] * 4)
    )
    assert there.tolist() == [False, True, False, False]
    assert found[0].sum() == found[2].sum() == found[3].sum() == 0
    assert found[1].view(12, 12)[:, :6].min() == 1
    assert found[1].view(12, 12)[:, 6:].max() == 0


def test_cells_may_cut_through_pixels():
    mask = np.zeros((3, 5), np.bool_)
    mask[0, :2] = True
    found = _area_mean(mask, (2, 2))
    assert found == pytest.approx(np.array([[2 * 1 / (2.5 * 1.5), 0], [0, 0]]))
    assert _area_mean(mask, (6, 10)).sum() == pytest.approx(2 * 4)
    random = np.random.default_rng(1).random((17, 23)) < 0.5
    assert _area_mean(random, (4, 7)).mean() == pytest.approx(random.mean())


def test_tokens_of_another_image_are_refused():
    name = "random:tiny-qwen2.5-vl"
    encoded = tokens_of(name, [(96, 96)])
    with pytest.raises(ValueError, match=r"224 x 224 pixels becomes 64 tokens, but 9 were given"):
        shares(name, [box((224, 224), 0, 0, 5, 5)], encoded)
    with pytest.raises(ValueError, match="objects of 2 images, but tokens of 1"):
        shares(name, [None, None], encoded)
    with pytest.raises(ValueError, match="tiles with the budget per_image"):
        shares(name, [], encoded)
