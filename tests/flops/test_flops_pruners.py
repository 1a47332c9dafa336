"""Counts with pruners against what torch counts while a real model runs with them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import selector

from ocvtp import Compose, attach, build_pruner
from ocvtp.flops import count, operations
from ocvtp.hosts.base import Savings
from ocvtp.hosts.loading import load_model
from ocvtp.pruners.specs import build_spec
from ocvtp.random_models import full_size
from ocvtp.slots import OCPruner, OCPrunerConfig

# Raters are drawn, not read; and older versions of transformers make positions by a product.
REL = 0.001
SIDES = {
    "llava": 96, "llava-next": 192, "llava-onevision": 224, "internvl": 224,
    "qwen2-vl": 280, "qwen2.5-vl": 280, "qwen3-vl": 320,
}  # fmt: skip
"""Pixels of the image."""
KEEP = {
    "llava": 70, "llava-next": 400, "llava-onevision": 200, "internvl": 40,
    "qwen2-vl": 50, "qwen2.5-vl": 50, "qwen3-vl": 50,
}  # fmt: skip
NEWLINES = {"llava-next": 24, "llava-onevision": 16}
OF_LLAVA = [
    "random", "divprune", "fopru", "zspaprune",
    "fastv", "pyramiddrop", "sparsevlm", "sparsevlm:plus=true", "dart", "visiondrop:later=true",
    "vitcop:guidance=received",
]  # fmt: skip
CASES = [("llava", spec) for spec in OF_LLAVA]
CASES += [("llava-next", spec) for spec in ("visionzip", "fopru", "fastv", "pyramiddrop")]
CASES += [
    ("llava", spec)
    for spec in ("tome", "vprune", "visionzip", "fopru:block=-1", "fastervlm", "pool", "vflowopt")
]
CASES += [
    ("qwen2.5-vl", spec)  # attention of block 0 is in windows
    for spec in ("divprune", "fopru", "fopru:block=0", "fastv", "pyramiddrop", "sparsevlm")
]
CASES += [("llava-onevision", spec) for spec in ("fopru", "visiondrop", "fastv")]
CASES += [("internvl", spec) for spec in ("visionzip", "fastervlm", "divprune", "sparsevlm")]
CASES += [("qwen2-vl", spec) for spec in ("fopru", "pool", "fastv")]
CASES += [("qwen3-vl", spec) for spec in ("fopru", "pool", "visiondrop:later=true", "sparsevlm")]


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any, dict[str, int], Any]]:
    """Of each family 20 thin layers: model, inputs, arguments of `count`, processor."""
    return {family: _model(family) for family in SIDES}


def _model(family: str) -> tuple[Any, Any, dict[str, int], Any]:
    tiny, processor = load_model(f"random:tiny-{family}")
    config = copy.deepcopy(tiny.config)
    config.text_config.num_hidden_layers = 20
    config.text_config.num_key_value_heads = 2
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = ["full_attention"] * 20
    if not family.startswith("qwen"):
        config.vision_config.num_hidden_layers = 12
    model = full_size.materialise(config, "float32")
    side = SIDES[family]
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    parts = [{"type": "image"}, {"type": "text", "text": "Is there a cat on the red table?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    inputs = processor(images=[Image.fromarray(noise)], text=[text], return_tensors="pt")
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    newlines = NEWLINES.get(family, 0)
    sizes = {"num_visual": visual - newlines, "num_newlines": newlines}
    text_length = inputs["input_ids"].shape[1] - visual
    return model, inputs, sizes | {"text_length": text_length}, processor


def _run(model: Any, inputs: Any) -> int:
    with operations.counter() as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    return int(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("family", SIDES)
def test_models_without_a_pruner(models, family):
    model, inputs, sizes, _ = models[family]
    assert count(model, **sizes).total == pytest.approx(_run(model, inputs), rel=REL)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "spec"), CASES)
def test_models_with_a_pruner(models, family, spec):
    model, inputs, sizes, processor = models[family]
    pruner = build_spec(spec, num_keep=KEEP[family])
    with pruner(model, processor=processor):
        expected = _run(model, inputs)
    found = count(model, pruner=pruner, **sizes)
    assert found.total == pytest.approx(expected, rel=REL)
    assert found.total < count(model, **sizes).total
    assert 0 <= found.select < found.total / 8


@pytest.mark.sampled(1)
@pytest.mark.parametrize("early", [False, True])
def test_the_learned_pruner_also_inside_the_tower(models, early):
    model, inputs, sizes, _ = models["llava"]
    torch.manual_seed(0)
    network = OCPruner(OCPrunerConfig(feature_dim=64, layer=3, slot_dim=32))
    pruner = build_pruner("ocvtp", num_keep=40, network=network, early=early)
    with pruner(model):
        expected = _run(model, inputs)
    assert count(model, pruner=pruner, **sizes).total == pytest.approx(expected, rel=REL)


@pytest.mark.covering(2)
@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
@pytest.mark.parametrize("read", [{"kind": "last_heads"}, {"learnt": True}])
@pytest.mark.parametrize("block", [3, 4])
def test_a_learned_scorer_inside_the_language_model(models, family, read, block):
    model, inputs, sizes, processor = models[family]
    text = model.config.text_config
    tower = getattr(model.config.vision_config, "embed_dim", None) or 64
    vip = {"block": block, "hidden": [2, 1], "dim": 8, "condition": 8, "blocks": 1, "heads": 2}
    heads = text.num_attention_heads
    network = selector(
        "llm_layers", tower, "vip", text.hidden_size, heads, layer=4, sizes=vip | read
    )
    pruner = build_pruner("learned_layers", network=network, stages=((4, 30),))
    with pruner(model, processor=processor):
        expected = _run(model, inputs)
    found = count(model, pruner=pruner, **sizes)
    assert found.total == pytest.approx(expected, rel=REL)


@pytest.mark.covering(2)
@pytest.mark.sampled(1)
@pytest.mark.parametrize("cut_tower", [False, True])
@pytest.mark.parametrize("project_kept", [False, True])
@pytest.mark.parametrize("name", ["visionzip", "tome"])
def test_every_saving(models, name, cut_tower, project_kept):
    model, inputs, sizes, _ = models["llava"]
    pruner, savings = build_pruner(name, num_keep=40), Savings(cut_tower, project_kept)
    handle = attach(model, pruner, savings=savings)
    try:
        expected = _run(model, inputs)
    finally:
        handle.remove()
    found = count(model, pruner=pruner, savings=savings, **sizes)
    assert found.total == pytest.approx(expected, rel=REL)


@pytest.mark.slow
def test_pixels_tower_and_language_model_together(models):
    model, inputs, sizes, processor = models["llava"]
    pruner = Compose(
        [
            build_pruner("vprune", num_keep=120),
            build_pruner("tome", num_keep=90),
            build_pruner("uniform", num_keep=60),
            build_pruner("fastv", stages=((2, 20),)),
        ]
    )
    with pruner(model, processor=processor):
        expected = _run(model, inputs)
    found = count(model, pruner=pruner, **sizes)
    assert found.total == pytest.approx(expected, rel=REL)
    assert found.visual == (60,) * 2 + (20,) * 18
