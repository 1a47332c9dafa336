"""The pruned LLaVA in vLLM: registration, places in the prompt, features. No kernel of vLLM runs.

B images, K kept, D' width of the language model. `make test-vllm` runs this.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from served import ARCHITECTURE, DEMO, NETWORK, SPECS, built, kept_by_transformers, load, overrides
from served import save_siglip as save_siglip_model

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm import ModelRegistry
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from ocvtp.serving.plan import Plan
from ocvtp.serving.vllm_plugin import register

if not current_platform.device_type:
    reason = "vLLM found no device; VLLM_TARGET_DEVICE=cpu, which make test-vllm sets, names one"
    pytest.skip(reason, allow_module_level=True)
register()
NUM_KEEP = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Any]:
    return {"clip": DEMO, "siglip": save_siglip_model(tmp_path_factory.mktemp("siglip"))}


def arguments(folder: Any, spec: str = "divprune", num_keep: int = NUM_KEEP, **more: Any) -> Any:
    given = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True} | more
    given |= {"limit_mm_per_prompt": {"image": 3}, "hf_overrides": overrides(spec, num_keep)}
    return EngineArgs(model=str(folder), **given)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """vLLM's process groups, of this process alone."""
    store = tmp_path_factory.mktemp("groups") / "store"
    with set_current_vllm_config(arguments(DEMO).create_engine_config()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def served(folders, groups) -> dict[str, Any]:
    """Tower -> (vLLM's model by vLLM's loader, transformers' model of the same files)."""
    models = {}
    for tower, folder in folders.items():
        config = arguments(folder).create_engine_config()
        with set_current_vllm_config(config):
            models[tower] = get_model(vllm_config=config).eval(), load(folder)
    return models


def test_the_entry_point_names_the_plugin():
    [point] = [p for p in entry_points(group="vllm.general_plugins") if p.name == "ocvtp"]
    assert point.load() is register


def test_registration_finds_the_class_and_may_happen_twice(folders):
    register()
    config = arguments(folders["clip"]).create_model_config()
    cls, name = ModelRegistry.resolve_model_cls([ARCHITECTURE], config)
    assert (cls.__name__, name) == (ARCHITECTURE, ARCHITECTURE)
    assert config.is_multimodal_model


def prepare(folder: Any, prompt: str, sizes: list[tuple[int, int]], **settings: Any) -> Any:
    from PIL import Image

    config = arguments(folder, **settings).create_model_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    images = [Image.new("RGB", size, (40 * i, 90, 200)) for i, size in enumerate(sizes)]
    ids = processor.info.get_tokenizer().encode(prompt)
    items = processor.info.parse_mm_data({"image": images})
    return ids, config.hf_config.image_token_index, processor(ids, items, None)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("spec", "num_keep", "expected"), [("divprune", 5, 5), ("visionzip:guidance=received", 7, 7)]
)
def test_every_image_takes_k_places_whatever_its_size(folders, tower, spec, num_keep, expected):
    sizes = [(96, 96), (300, 40), (17, 211)]
    prompt = "<image>what?<image>who?<image>"
    before, image, result = prepare(folders[tower], prompt, sizes, spec=spec, num_keep=num_keep)
    after = result["prompt_token_ids"]
    assert [i for i in after if i != image] == [i for i in before if i != image]
    places = result["mm_placeholders"]["image"]
    assert [place.length for place in places] == [expected] * 3
    for place in places:
        assert after[place.offset : place.offset + place.length] == [image] * expected
    assert after.count(image) == 3 * expected


@pytest.mark.parametrize("settings", [{"spec": "trim"}, {"spec": "fastv:stages=[[1,4]]"}])
def test_the_first_process_refuses(folders, settings):
    with pytest.raises(ValueError, match="use one of divprune"):
        prepare(folders["clip"], "<image>", [(96, 96)], **settings)


def test_embeddings_in_place_of_images_are_refused(folders):
    with pytest.raises(ValueError, match="enable_mm_embeds"):
        prepare(folders["clip"], "<image>", [(96, 96)], enable_mm_embeds=True)


def pixels(model: Any) -> Any:
    """Images with something in them: blobs of several sizes, [3, 3, H, W]."""
    side = model.config.vision_config.image_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        coarse = torch.randn(3, 3, side // 8, side // 8)
        fine = 0.3 * torch.randn(3, 3, side, side)
    return torch.nn.functional.interpolate(coarse, size=side, mode="bilinear") + fine


@torch.inference_mode()
def kept_by_vllm(model: Any, spec: str, num_keep: int, images: Any) -> Any:
    """[B, K, D'] by the whole multi-modal path of the model."""
    before = model.plan
    model.plan = Plan(built(spec, num_keep), before.tower, num_keep)
    try:
        return model.embed_multimodal(pixel_values=images)
    finally:
        model.plan = before


@pytest.mark.parametrize(
    ("tower", "spec"), [(tower, spec) for tower, specs in SPECS.items() for spec in specs]
)
def test_features_are_those_of_transformers(served, tower, spec):
    ours, theirs = served[tower]
    images = pixels(theirs)
    num_keep = ours.plan.tower.num_tokens if spec == "none" else NUM_KEEP
    expected = kept_by_transformers(theirs, built(spec, num_keep), images)
    found = kept_by_vllm(ours, spec, num_keep, images)
    assert found.shape == expected.shape == (3, num_keep, expected.shape[2])
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-5)


def test_other_tokens_are_other_features(served):
    """The comparison above can fail: the methods do not all keep the same."""
    ours, theirs = served["clip"]
    images = pixels(theirs)
    kept = {spec: kept_by_vllm(ours, spec, NUM_KEEP, images) for spec in ("divprune", "fastervlm")}
    assert (kept["divprune"] - kept["fastervlm"]).abs().max() > 0.1


def test_an_image_is_pruned_the_same_in_any_batch(served):
    ours, theirs = served["clip"]
    images = pixels(theirs)
    together = kept_by_vllm(ours, "visionzip", NUM_KEEP, images)
    for image, expected in zip(images, together, strict=True):
        alone = kept_by_vllm(ours, "visionzip", NUM_KEEP, image[None])
        torch.testing.assert_close(alone[0], expected, rtol=0, atol=1e-4)


def test_no_module_is_hooked(served):
    for module in served["clip"][0].modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_network_keeps_its_type_in_a_half_precision_engine(folders, groups):
    spec = f"ocvtp:checkpoint={NETWORK}"
    config = arguments(folders["clip"], spec, dtype="bfloat16").create_engine_config()
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    network = model.plan.pruner.network
    saved = built(spec, NUM_KEEP).network
    for name, tensor in saved.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_a_wrong_number_of_tokens_is_no_ones(served):
    ours, theirs = served["clip"]
    before = ours.plan
    ours.plan = Plan(built("divprune", 4), before.tower, 5)
    try:
        with pytest.raises(RuntimeError, match="kept 4 tokens, but 5 places"):
            ours.embed_multimodal(pixel_values=pixels(theirs))
    finally:
        ours.plan = before
