"""The OC-pruner on hosts in tiles and of any grid: slots of all tiles, or of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ocvtp import OCPruner, build_pruner
from ocvtp.encoders.tiles import TiledEncoder
from ocvtp.hosts.loading import load_model
from ocvtp.slots.config import OCPrunerConfig

SIZES = [(90, 140), (300, 101), (64, 64)]  # heights and widths
WORDS = "<image>\nWhat is in the picture?"


@pytest.fixture(scope="module")
def model_and_processor() -> Any:
    return load_model("random:tiny-llava-next")


@pytest.fixture(scope="module")
def network() -> OCPruner:
    """Trained for nothing, but of a spread that makes slots disagree."""
    torch.manual_seed(0)
    sizes = {"feature_dim": 64, "hidden_dim": 32, "slot_dim": 16, "ffn_dim": 32, "noise_rows": 64}
    network = OCPruner(OCPrunerConfig(**sizes, grid_hw=(12, 12), layer=3)).eval()
    with torch.no_grad():
        network.attention.to_query.weight.mul_(6.0)
    return network


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in SIZES]


def chosen_by_hand(network: OCPruner, tokens: Tensor, fill: Tensor, num_keep: int) -> set[int]:
    """Of one view's tokens [N, D]: each slot's best, then those of the most attention [N]."""
    _, attention = network.assign(tokens[None], num_keep)
    kept = {int(slot.argmax()) for slot in attention[0]}
    for token in fill.argsort(descending=True).tolist():
        if len(kept) < num_keep:
            kept.add(token)
    return kept


@pytest.mark.parametrize("budget", ["per_image", "per_tile"])
@torch.no_grad()
def test_slots_are_those_of_the_tokens_it_was_trained_on(
    model_and_processor: Any, network: OCPruner, budget: Any
) -> None:
    """`network.assign` on what the training encoder makes of the same images, tile by tile."""
    model, processor = model_and_processor
    pruner = build_pruner("ocvtp", num_keep=12, network=network)
    inputs = processor(images=pictures(), text=[WORDS] * 3, return_tensors="pt", padding=True)
    seen: list[Any] = []
    with pruner(model, budget=budget, on_prune=seen.append):
        model(**inputs)
    found = seen[0].selection.keep_indices
    joint = {"per_image": "joint", "per_tile": "per_tile"}[budget]
    encoder = TiledEncoder("random:tiny", layer=3, slots=joint).load(pruner.needs)
    pixels = [encoder.transform(picture) for picture in pictures()]
    tokens = encoder(pixels, SIZES)
    order = list(range(len(tokens.valid)))
    if budget == "per_tile":  # the host shows tiles image by image, training base views first
        counts = [len(tiles) for tiles in pixels]
        first = [sum(counts[:i]) for i in range(3)]
        ours = first + [i for i in order if i not in first]
        order = [ours.index(i) for i in order]
    assert len(found) == len(order)
    scores = tokens.attention[pruner.needs.attention[0]]
    for kept, row in zip(found, order, strict=True):
        real = tokens.real[row].nonzero()[:, 0]
        places = chosen_by_hand(network, tokens.hidden[3][row, real], scores[row, real], 12)
        assert set(kept.tolist()) == {int(real[place]) for place in places}
        assert len(kept) == 12


@torch.no_grad()
def test_an_image_of_qwen_alone_and_among_others(network: OCPruner) -> None:
    """Grids of any shape: padding tokens take no slot."""
    model, processor = load_model("random:tiny-qwen2.5-vl")
    pruner = build_pruner("ocvtp", num_keep=4, network=network)
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>"

    def kept(images: list[Image.Image]) -> Tensor:
        texts = [prompt] * len(images)
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
        seen: list[Any] = []
        with pruner(model, on_prune=seen.append):
            model(**inputs)
        return seen[0].selection.keep_indices

    assert_close(kept(pictures()), torch.cat([kept([picture]) for picture in pictures()]))
