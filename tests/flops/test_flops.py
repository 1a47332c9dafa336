"""Operations by three conventions: published figures, and what torch itself counts."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import DINOS, tiny_llava
from transformers import SiglipVisionConfig

from ocvtp import Compose, build_pruner
from ocvtp.flops import count, operations
from ocvtp.flops.count import NOTHING_SAVED
from ocvtp.flops.sizes import sizes_of
from ocvtp.hosts import find_host
from ocvtp.hosts.loading import load_config
from ocvtp.pruners.specs import build_spec
from ocvtp.random_models import full_size
from ocvtp.transformers_names import hands_on_arguments

# model, convention -> visual tokens: 10^12 operations of the language model; from the papers
PUBLISHED = {
    ("llava-1.5-7b", "oc-vtp"): {576: 6.31, 192: 2.28, 128: 1.62, 64: 0.97},
    ("llava-1.5-7b", "macs"): {576: 3.82, 192: 1.25, 128: 0.83, 64: 0.42},
    ("llava-1.5-7b", "true"): {576: 8.07, 192: 2.93, 128: 2.09, 64: 1.25},
    ("llava-next-7b", "oc-vtp"): {2880: 33.76, 640: 7.00, 320: 3.61, 160: 1.95},
    ("llava-next-7b", "macs"): {2880: 20.83, 640: 4.25, 320: 2.10, 160: 1.04},
    ("llava-next-7b", "true"): {2880: 42.16, 640: 8.94, 320: 4.62, 160: 2.51},
}
# arguments of get_image_features
IMAGES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "llava-1.5-7b": ((1, 3, 336, 336), {}),
    "llava-mid": ((1, 3, 336, 336), {}),
    "llava-next-7b": ((1, 5, 3, 336, 336), {"image_sizes": torch.tensor([[672, 672]])}),
    "qwen2.5-vl-7b": ((24 * 28, 1176), {"image_grid_thw": torch.tensor([[1, 24, 28]])}),
}


@cache
def known(name):
    """The sizes of a model, which are read once for all counts."""
    return sizes_of(full_size.config_of(name))


@pytest.mark.parametrize(("name", "convention"), PUBLISHED)
def test_published_figures(name, convention):
    sizes = known(name)
    for tokens, expected in PUBLISHED[name, convention].items():
        found = count(sizes, num_keep=tokens).conventions[convention]
        assert round(found / 1e12, 2) == expected, tokens


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in list(IMAGES)[1:]]


@pytest.fixture(scope="module", params=["llava-1.5-7b", *OTHERS])
def whole(request):
    """A model without memory, and its name."""
    return request.param, full_size.build(request.param, device="meta")[0]


def test_the_language_model_as_torch_counts_it(whole):
    (name, model), text_length = whole, 200
    expected = count(model, text_length=text_length)
    length = expected.visual[0] + text_length
    # A mask of four dimensions: that of others would be looked at, and there is nothing to see.
    inputs = {
        "inputs_embeds": torch.empty(
            1, length, model.config.get_text_config().hidden_size, dtype=model.dtype, device="meta"
        ),
        "attention_mask": torch.empty(1, 1, length, length, dtype=torch.bool, device="meta"),
    }
    if name.startswith("qwen"):
        inputs["position_ids"] = torch.arange(length, device="meta").expand(3, 1, length)
    with operations.counter() as counter, torch.no_grad():
        states = model.model.language_model(**inputs).last_hidden_state
        model.lm_head(states[:, -1:])
    assert expected.language_model == pytest.approx(counter.get_total_flops(), rel=0.001)
    assert expected.conventions["true"] == expected.language_model


@pytest.mark.slow
def test_towers_and_projectors_as_torch_counts_them(whole):
    name, model = whole
    shape, arguments = IMAGES[name]
    pixels = torch.empty(shape, dtype=model.dtype, device="meta")
    hooks = []
    if name.startswith("qwen"):  # positions come from the grid, which is real

        def on_meta(module, args):
            return tuple(value.to("meta") for value in args)

        hooks.append(model.model.visual.rotary_pos_emb.register_forward_pre_hook(on_meta))
    with operations.counter() as counter, torch.no_grad():
        model.model.get_image_features(pixels, **arguments)
    for hook in hooks:
        hook.remove()
    found = count(model, num_visual=12 * 14 if name.startswith("qwen") else None)
    assert found.tower + found.projector == pytest.approx(counter.get_total_flops(), rel=0.001)
    assert found.select == 0
    assert found.total == found.tower + found.projector + found.language_model


@pytest.mark.parametrize("kind", DINOS)
def test_dino_towers_as_torch_counts_them(kind):
    """The language model reads registers, too, which pruners do not drop."""
    model, registers = tiny_llava(kind), 0 if kind == "dinov2" else 4
    with operations.counter() as counter, torch.no_grad():
        model.model.get_image_features(torch.zeros(1, 3, 56, 56))
    found = count(model)
    assert found.tower + found.projector == pytest.approx(counter.get_total_flops(), rel=0.001)
    assert found.visual == (registers + 16,) * 3
    ids = torch.tensor([[1, *[100] * (registers + 16), 5]])
    for name in ("fastervlm", "vprune", "tome"):
        if name != "fastervlm" and not hands_on_arguments(find_host(model).tower_parts().blocks[0]):
            continue
        pruner = build_pruner(name, num_keep=6)
        counted = count(model, pruner=pruner, text_length=2)
        assert counted.visual == (registers + 6,) * 3
        linears = 0

        def note(module, args, output):
            nonlocal linears
            linears += 2 * output.numel() * module.in_features

        hooks = [
            module.register_forward_hook(note)
            for module in model.model.multi_modal_projector.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        with pruner(model), torch.no_grad():
            model(input_ids=ids, pixel_values=torch.zeros(1, 3, 56, 56))
        for hook in hooks:
            hook.remove()
        assert linears == counted.projector


def test_a_head_that_pools_counts_where_it_runs():
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        image_size=112, patch_size=14,
    )  # fmt: skip
    config = copy.deepcopy(load_config("random:tiny-llava"))
    config.vision_config, config.vision_feature_select_strategy = vision, "full"
    model = full_size.materialise(config, "float32")
    with operations.counter() as counter, torch.no_grad():
        model.model.get_image_features(torch.zeros(1, 3, 112, 112))
    found = count(model)
    assert found.tower + found.projector == pytest.approx(counter.get_total_flops(), rel=0.001)
    pruner = build_pruner("random", num_keep=6)
    with pruner(model), operations.counter() as counter, torch.no_grad():
        ids = torch.tensor([[1, *[config.image_token_id] * 64, 5]])
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 112, 112), logits_to_keep=1)
    counted = count(model, pruner=pruner, text_length=2)
    assert counted.total == pytest.approx(counter.get_total_flops(), rel=0.001)
    assert counted.tower < found.tower


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_counts_in_every_version(masked):
    query, key, value = torch.rand(2, 3, 5, 8), torch.rand(2, 3, 7, 8), torch.rand(2, 3, 7, 8)
    mask = torch.ones(5, 7, dtype=torch.bool) if masked else None
    with operations.counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert counter.get_total_flops() == 2 * 2 * 3 * 5 * 7 * (8 + 8)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    made = operations.formulas()[kernel](query, key, value, out_val=query)
    assert made == counter.get_total_flops()


def test_parts_of_llava_as_its_sizes_say():
    found = count(known("llava-1.5-7b"))
    block = 2 * (4 * 577 * 1024**2 + 2 * 577**2 * 1024 + 2 * 577 * 1024 * 4096)
    assert found.tower == 2 * 576 * 588 * 1024 + 24 * block
    assert found.projector == 2 * 576 * (1024 * 4096 + 4096**2)
    assert found.lm_head == 2 * 4096 * 32064


def test_grouped_query_attention_counts_keys_with_their_own_width():
    found = count(known("qwen2.5-vl-7b"), num_keep=64)
    n, d, k, m = 96, 3584, 512, 18944
    assert found.layers[0] == 2 * (2 * n * d * (d + k) + 2 * n**2 * d + 3 * n * d * m)
    per_layer = 2 * 64 * d * (d + k) + 2 * 64**2 * d + 3 * 64 * d * m
    assert found.conventions["macs"] == 28 * per_layer


def test_several_images_and_newlines():
    sizes = known("llava-next-7b")
    one, two = count(sizes), count(sizes, num_images=2, num_newlines=48)
    assert two.visual == (2 * (2880 + 48),) * 32
    assert (two.tower, two.projector) == (2 * one.tower, 2 * one.projector)
    longer = count(sizes, text_length=32 + 48 + 2928)
    assert two.layers == longer.layers
    assert count(sizes, num_keep=160, num_newlines=48).visual == (208,) * 32


def test_savings_can_be_left_out():
    sizes = known("llava-1.5-7b")
    pruner = build_pruner("fastervlm", num_keep=64)
    plain, saving = count(sizes), count(sizes, pruner=pruner)
    without = count(sizes, pruner=pruner, savings=NOTHING_SAVED)
    assert (without.tower, without.projector) == (plain.tower, plain.projector)
    assert saving.tower < plain.tower  # the last block does not run
    assert saving.projector * 9 == plain.projector
    assert saving.select == without.select > 0


def test_the_bound_of_a_pruner_is_of_its_whole_way():
    sizes = known("llava-1.5-7b")
    early, late = (
        count(sizes, pruner=build_pruner(name, num_keep=64)) for name in ("vprune", "divprune")
    )
    assert early.language_model == late.language_model
    assert early.tower < late.tower / 5
    assert late.projector == count(sizes).projector  # it reads all projected tokens


def test_composed_pruners_act_one_after_the_other():
    pruners = [build_pruner("vprune", num_keep=288), build_pruner("fastv", stages=((2, 72),))]
    found = count(known("llava-1.5-7b"), pruner=Compose(pruners))
    assert found.visual == (288,) * 2 + (72,) * 30


REFUSED = {
    "600 tokens are no whole number of views": (
        {"num_visual": 600}, r"num_visual=600.*multiple of 576"),
    "more kept than there are": ({"num_keep": 577}, "0 to the 576"),
    "no text": ({"text_length": 0}, "text_length=0"),
    "a budget and a pruner": (
        {"num_keep": 5, "pruner": build_pruner("random", num_keep=5)}, "has its own"),
    "a budget that hangs on the image": (
        {"pruner": build_pruner("prumerge")}, "hangs on what is in the image"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        count(known("llava-1.5-7b"), **arguments)


def test_tiles_one_by_one_have_no_budget_of_an_image():
    sizes = known("llava-next-7b")
    with pytest.raises(ValueError, match="one tile at a time"):
        count(sizes, pruner=build_pruner("vprune", num_keep=640))
    found = count(sizes, pruner=build_pruner("vprune", keep_ratio=0.25))
    assert found.visual[0] == 5 * 144


def test_other_families_are_refused_with_those_that_are_known():
    config = load_config("random:tiny-internvl")
    with pytest.raises(ValueError, match=r"'internvl_vision' are not.*llava_next.*qwen2_5_vl"):
        count(config.vision_config)
    text = {"model_type": "qwen2_moe", "hidden_size": 96, "num_hidden_layers": 2, "vocab_size": 99}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4}
    of_experts = type(config)(vision_config=config.vision_config, text_config=text)
    with pytest.raises(ValueError, match="model_type='qwen2_moe' are not counted, whose layers"):
        count(of_experts)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("internvl", 5 * 16), ("llava-onevision", 5 * 64), ("qwen2-vl", 24**2), ("qwen3-vl", 21**2)
    ],
)  # fmt: skip
def test_the_usual_image_of_a_family(name, tokens):
    config = load_config(f"random:tiny-{name}")
    assert count(config).visual == (tokens,) * config.get_text_config().num_hidden_layers
    assert count(config, num_keep=9).visual[0] == 9


@pytest.mark.slow
def test_counting_makes_no_numbers_and_changes_no_configuration():
    model, _ = full_size.build("llava-mid", device="meta")
    config = full_size.config_of("qwen2.5-vl-7b")
    before, random = config.to_dict(), torch.random.get_rng_state()
    sizes = sizes_of(config)
    assert {weight.device.type for weight in sizes.host.model.parameters()} == {"meta"}
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert count(sizes, num_keep=9) == count(config, num_keep=9)
    assert count(model) == count(model.config) == count(full_size.config_of("llava-mid"))


@pytest.mark.parametrize(
    ("name", "pruner", "reason"),
    [
        ("qwen2.5-vl-7b", "fastervlm", "pruner 'fastervlm': .*CLS token, which the tower of Qwen"),
        ("qwen2.5-vl-7b", "cdpruner", "CLIP's space"),
        ("qwen2.5-vl-7b", "vprune", "the host of 'qwen2_5_vl' serves llm_input, llm_layers"),
        ("llava-1.5-7b", "fopru:block=24", r"blocks\[24\] does not exist"),
    ],
)
def test_what_a_model_cannot_run_is_refused_as_attach_does(name, pruner, reason):
    with pytest.raises(ValueError, match=reason):
        count(known(name), pruner=build_spec(pruner, num_keep=64))


def test_words_that_ask_and_what_they_attend_to_are_part_of_the_choice():
    stages = ((3, 300), (7, 200), (16, 110))
    pruner = build_pruner("sparsevlm", plus=True, stages=stages)
    found = count(known("llava-1.5-7b"), pruner=pruner, text_length=32)
    raters = 2 * 576 * 32 * 4096  # products of image and text embeddings
    scores = sum(2 * 32 * (n + 32) * 4096 + 2 * 32 * n for n in (576, 300, 200))
    assert found.select == raters + scores
