"""Models of real size with random weights: their sizes, their buffers, and that they run."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from ocvtp.hosts.loading import FULL_SIZE_MODELS, RANDOM_MODELS, load_config, load_model
from ocvtp.random_models import full_size

pytestmark = pytest.mark.sampled(2)

# parameters of the public checkpoints, as their safetensors index counts them
PUBLISHED = {
    "llava-1.5-7b": 7_063_427_072,
    "llava-1.5-13b": 13_351_494_656,
    "llava-next-7b": 7_063_431_168,
    "qwen2.5-vl-7b": 8_292_166_656,
}
# visual tokens of a square image of so many pixels
TOKENS = {
    "llava-1.5-7b": (336, 576),
    "llava-next-7b": (672, 2880 + 48),  # and one newline a row of the tiles
    "qwen2.5-vl-7b": (672, 576),
    "llava-mid": (336, 576),
    "demo": (96, 144),
}


def small(name: str):
    """A configuration of the family, with the tower and language model cut to two small layers."""
    config = full_size.config_of(name)
    vision, text = config.vision_config, config.text_config
    text.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2})
    text.update({"vocab_size": 300, "head_dim": 16, "num_attention_heads": 4})
    text.num_key_value_heads = 2 if name.startswith("qwen") else 4
    vision.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2})
    vision.update({"num_attention_heads": 4})
    if name.startswith("qwen"):
        vision.update({"depth": 2, "num_heads": 4, "out_hidden_size": 64})
        text.layer_types = text.layer_types[:2]
        text.rope_parameters["mrope_section"] = [2, 3, 3]
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_public_checkpoints(name):
    model, _ = full_size.build(name, device="meta")
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED[name]
    expected = torch.bfloat16 if name.startswith("qwen") else torch.float16
    assert {weight.dtype for weight in model.parameters()} == {expected}
    assert not model.training


@pytest.mark.parametrize("name", TOKENS)
def test_processor_and_model_agree_on_visual_tokens(name):
    side, count = TOKENS[name]
    model, processor = full_size.build(name, device="meta")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (side, side))], text=[text], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == count
    assert len(processor.tokenizer) <= model.config.get_text_config().vocab_size


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_buffers_and_dtypes_are_those_of_a_loaded_checkpoint(name, dtype, tmp_path):
    config = small(name)
    model = full_size.materialise(config, dtype, seed=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype)
    expected, found = dict(loaded.named_buffers()), dict(model.named_buffers())
    assert found.keys() == expected.keys()
    assert found
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key
    for key, value in loaded.named_parameters():
        assert torch.equal(model.get_parameter(key), value), key


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, two, other = (full_size.materialise(small("llava-mid"), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for key, value in one.named_parameters():
        assert torch.equal(value, two.get_parameter(key))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert 0.015 < float(one.lm_head.weight.detach().std()) < 0.025


def test_the_demo_is_the_shipped_configuration_with_other_weights():
    shipped, _ = load_model(str(full_size.DEMO), "float16")
    model, _ = load_model("random:demo")
    ignored = {"transformers_version", "_name_or_path"}
    for part in ("text_config", "vision_config"):
        mine, theirs = (getattr(m.config, part).to_diff_dict() for m in (model, shipped))
        for key in theirs.keys() - ignored:
            assert mine[key] == theirs[key], key
    assert model.dtype == shipped.dtype
    weight = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.get_parameter(weight), shipped.get_parameter(weight))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_configuration_that_is_changed_changes_no_other():
    full_size.config_of("qwen2.5-vl-7b").text_config.rope_parameters["mrope_section"][0] = 1
    sections = full_size.config_of("qwen2.5-vl-7b").text_config.rope_parameters["mrope_section"]
    assert sections == [16, 24, 24]


def test_a_missing_demo_folder_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(full_size, "DEMO", tmp_path)
    with pytest.raises(ValueError, match="comes with the repository"):
        full_size.build("demo")


def test_unknown_names_are_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"llava-1\.5-70b.*qwen2\.5-vl-7b"):
        full_size.config_of("llava-1.5-70b")
    with pytest.raises(ValueError, match=r"nowhere.*llava-1\.5-7b.*random:tiny-llava"):
        load_config("/nowhere")
    with pytest.raises(ValueError, match=r"random:tiny-llava.*random:llava-mid"):
        load_model("random:nothing")


def test_names_of_tiny_and_of_full_size_models_stay_apart():
    assert not set(RANDOM_MODELS) & set(FULL_SIZE_MODELS)
    model, _ = load_model("random:qwen2.5-vl-7b", device="meta")
    assert model.device.type == "meta"


@pytest.mark.parametrize("name", ["random:tiny-llava", str(full_size.DEMO)])
def test_rotary_frequencies_keep_their_precision(name):
    model, _ = load_model(name, "bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    frequencies = model.model.language_model.rotary_emb.inv_freq
    exact = load_model(name, "float32")[0].model.language_model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, exact)


@pytest.mark.parametrize("name", ["demo", "random:demo", str(full_size.DEMO), "random:tiny-llava"])
def test_configurations_are_those_of_the_models(name):
    expected = load_model(name if "/" in name or ":" in name else f"random:{name}")[0].config
    for part in ("text_config", "vision_config"):
        mine, theirs = (getattr(c, part).to_diff_dict() for c in (load_config(name), expected))
        for key in theirs.keys() - {"transformers_version", "_name_or_path", "dtype"}:
            assert mine[key] == theirs[key], key
