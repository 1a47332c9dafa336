"""Modules that others replace under an attached pruner: the same answers in either order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from matrix.families import BATCH, FAMILIES, ONE, Family
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from reference import fingerprint
from test_llava_methods import residue
from torch import Tensor, nn

from ocvtp import attach, build_pruner
from ocvtp.transformers_names import rotate_heads

pytestmark = pytest.mark.sampled(2)

LLAVA = FAMILIES[0]
TARGETS = r".*\.(q_proj|k_proj|v_proj|qkv|fc1|linear_1|proj)$"
"""Of towers, projectors and language models."""
PRUNER: dict[str, dict[str, Any]] = {
    "random": {"num_keep": 6},
    "fopru": {"num_keep": 6},
    "fastv": {"keep_ratio": 0.8, "layer": 2},
    "visionzip": {"num_keep": 6},
    "prumerge_plus": {"num_keep": 6},
    "vprune": {"num_keep": 6},
    "tome": {"num_keep": 6},
    "sparsevlm": {"stages": [[1, 12], [2, 6]]},
}
ON_ALL_HOSTS = ("random", "fopru", "fastv")
RESIZED = ("llava_onevision", "fopru")  # the model reads no tokens of the tower
PRUNERS = [
    pytest.param(
        family,
        name,
        id=f"{family.host}-{name}",
        marks=[] if family is LLAVA or name == "fopru" else [pytest.mark.slow],
    )
    for family in FAMILIES
    for name in PRUNER
    if family is LLAVA or (name in ON_ALL_HOSTS and (family.host, name) != RESIZED)
]


def config(**settings: Any) -> LoraConfig:
    settings = {"target_modules": TARGETS} | settings
    return LoraConfig(r=4, init_lora_weights=False, **settings)


def adapted(model: Any, seed: int = 1, **settings: Any) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config(**settings)).eval()


@contextmanager
def noting(model: Any, name: str) -> Iterator[Callable[[Any], list[Any]]]:
    """Attach; what is given asks a model, and says what was kept and answered."""
    prompts: list[Any] = []
    handle = attach(model, build_pruner(name, **PRUNER[name]), on_prune=prompts.append)

    def ask(model: Any, inputs: Any) -> list[Any]:
        prompts.clear()
        with torch.no_grad():
            logits = model(**inputs).logits
            said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        return [prompts[0].selection.keep_indices, logits, said]

    try:
        yield ask
    finally:
        handle.remove()


def alike(ours: list[Any], theirs: list[Any]) -> bool:
    return all(a.shape == b.shape and a.equal(b) for a, b in zip(ours, theirs, strict=True))


def used(family: Family) -> Any:
    model = deepcopy(family.model)
    model.generate(**family.make(ONE, "left"), max_new_tokens=1)
    return model


@pytest.mark.parametrize(("family", "name"), PRUNERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_adapters_come_and_go_under_a_pruner(family: Family, name: str) -> None:
    inputs = family.make(BATCH, "left")
    plain, merged = used(family), used(family)
    merged_in = adapted(merged).merge_and_unload()
    both = adapted(deepcopy(plain))
    with noting(plain, name) as ask:
        bare = ask(plain, inputs)
    with noting(both, name) as ask:
        expected = ask(both, inputs)
    with noting(merged_in, name) as ask:
        unloaded = ask(merged_in, inputs)
    assert not alike(expected, bare)

    model = used(family)
    before = set(fingerprint(model))
    with noting(model, name) as ask:
        assert alike(ask(model, inputs), bare)
        wrapped = adapted(model)
        assert alike(ask(wrapped, inputs), expected)
        assert alike(ask(model, inputs), expected)
        with wrapped.disable_adapter():
            assert alike(ask(wrapped, inputs), bare)
        assert alike(ask(wrapped.merge_and_unload(), inputs), unloaded)
    assert residue(model) == set()
    assert before >= {key for key in fingerprint(model) if "ocvtp" in key}

    model = used(family)
    wrapped = adapted(model)
    with noting(wrapped, name) as ask:
        assert alike(ask(wrapped, inputs), expected)
        taken_out = [module for module in model.modules() if hasattr(module, "lora_A")]
        assert alike(ask(wrapped.unload(), inputs), bare)
    assert residue(model) == set()
    assert all(residue(module) == set() for module in taken_out)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_switched_under_a_pruner(use_dora: bool) -> None:
    inputs, model = LLAVA.make(BATCH, "left"), used(LLAVA)
    expected = []
    for seed in (1, 2):
        other = adapted(used(LLAVA), seed, use_dora=use_dora)
        with noting(other, "visionzip") as ask:
            expected.append(ask(other, inputs))
    assert not alike(*expected)
    with noting(model, "visionzip") as ask:
        wrapped = adapted(model, 1, use_dora=use_dora)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            wrapped.add_adapter("other", config(use_dora=use_dora))
        assert alike(ask(wrapped, inputs), expected[0])
        wrapped.set_adapter("other")
        assert alike(ask(wrapped, inputs), expected[1])
        wrapped.delete_adapter("default")
        assert alike(ask(wrapped, inputs), expected[1])
    assert residue(model) == set()


def test_adapters_are_injected_under_a_pruner() -> None:
    inputs, model, other = LLAVA.make(BATCH, "left"), used(LLAVA), used(LLAVA)

    def add(model: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            inject_adapter_in_model(config(), model)

    add(other)
    with noting(other, "visionzip") as ask:
        expected = ask(other, inputs)
    with noting(model, "visionzip") as ask:
        assert not alike(ask(model, inputs), expected)
        add(model)
        assert alike(ask(model, inputs), expected)
    assert residue(model) == set()


WHOLE = {
    "multi_modal_projector": lambda model: model.model.multi_modal_projector.linear_1.weight,
    "vision_tower": lambda model: model.model.vision_tower.encoder.layers[1].mlp.fc1.weight,
    "language_model": lambda model: model.model.language_model.layers[1].mlp.down_proj.weight,
    "self_attn": lambda model: model.model.vision_tower.encoder.layers[1].self_attn.q_proj.weight,
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("name", ["random", "visionzip", "prumerge_plus", "tome", "fastv"])
def test_copies_of_modules_are_trained_under_a_pruner(whole: str, name: str) -> None:
    inputs = LLAVA.make(BATCH, "left")
    settings = {"modules_to_save": [whole], "target_modules": r".*language_model.*up_proj"}
    if whole == "language_model":
        settings["target_modules"] = r".*vision_tower.*fc2"

    def change(model: Any) -> None:
        with torch.no_grad():
            WHOLE[whole](model).mul_(torch.linspace(-3, 3, WHOLE[whole](model).shape[0])[:, None])

    plain, other = used(LLAVA), used(LLAVA)
    with noting(plain, name) as ask:
        bare = ask(plain, inputs)
    wrapped = adapted(other, **settings)
    change(other)
    with noting(wrapped, name) as ask:
        expected = ask(wrapped, inputs)
    assert not alike(expected, bare)

    model = used(LLAVA)
    with noting(model, name) as ask:
        wrapped = adapted(model, **settings)
        change(model)
        assert alike(ask(wrapped, inputs), expected)
        with wrapped.disable_adapter():
            assert alike(ask(wrapped, inputs), bare)
        assert alike(ask(wrapped, inputs), expected)
        copies = [m.modules_to_save for m in model.modules() if hasattr(m, "modules_to_save")]
        originals = [m.original_module for m in model.modules() if hasattr(m, "modules_to_save")]
        assert copies
        wrapped.unload()
        ask(model, inputs)
    assert residue(model) == set()
    assert all(residue(module) == set() for module in (*copies, *originals))


@pytest.mark.parametrize("name", ["tome", "vprune", "visionzip", "fastv"])
def test_copies_of_hooked_modules_hold_no_second_model(name: str) -> None:
    model = used(LLAVA)
    with noting(model, name):
        for module in (model.model.vision_tower, model.model.language_model):
            memo: dict[int, Any] = {}
            deepcopy(module, memo)
            assert id(module) in memo
            assert id(model) not in memo


class Rounded(nn.Module):
    """What a library puts in the place of a linear layer to quantise it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter((linear.weight * 8).round() / 8, requires_grad=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.weight, self.bias)


def quantise(model: Any) -> None:
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Rounded(child))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("family", "name"), PRUNERS)
def test_modules_are_swapped_by_hand(family: Family, name: str) -> None:
    inputs, model, other = family.make(BATCH, "left"), used(family), used(family)
    quantise(other)
    with noting(other, name) as ask:
        expected = ask(other, inputs)
    old = [*model.modules()]
    with noting(model, name) as ask:
        assert not alike(ask(model, inputs), expected)
        quantise(model)
        assert alike(ask(model, inputs), expected)
        model.model.language_model = deepcopy(model.model.language_model)
        assert alike(ask(model, inputs), expected)
    assert residue(model) == set()
    assert all(residue(module) == set() for module in old)


def test_heads_that_nothing_turns_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing next to Linear turns its heads"):
        rotate_heads(nn.Linear(1, 1), *torch.zeros(3, 1, 1, 1, 2))


def test_a_language_model_that_is_compiled_meanwhile_is_refused() -> None:
    inputs, model = LLAVA.make(ONE, "left"), used(LLAVA)
    with noting(model, "fastv") as ask:
        ask(model, inputs)
        layers = model.model.language_model.layers
        layers[2] = torch.compile(layers[2], backend="eager")
        for _ in range(2):
            with pytest.raises(ValueError, match="whose layers are compiled"):
                ask(model, inputs)
    assert residue(model) == set()


def test_hooks_of_accelerate_that_are_taken_away_take_no_pruner_with_them() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    inputs, model = LLAVA.make(BATCH, "left"), used(LLAVA)
    settings = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    with noting(model, "visionzip"):
        pruned = model.generate(**inputs, **settings)
    add_hook_to_module(model, ModelHook())
    with noting(model, "visionzip"):
        assert model.generate(**inputs, **settings).equal(pruned)
        remove_hook_from_module(model)  # puts back what stood there before the pruner
        assert model.generate(**inputs, **settings).equal(pruned)
    assert model.generate(**inputs, **settings).equal(expected)
    assert residue(model) == set()


def test_a_prompt_continues_after_modules_were_replaced() -> None:
    inputs, model = LLAVA.make(ONE, "left"), used(LLAVA)
    settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}

    def talk(model: Any, between: Callable[[Any], None]) -> Tensor:
        with noting(model, "fastv"):
            first = model.generate(**inputs, **settings)
            between(model)
            ids = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], dim=1)
            cache = first.get("cache", first.get("past_key_values"))
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return model.generate(**turn, past_key_values=cache, **settings).sequences

    def copy_layers(model: Any) -> None:
        layers = model.model.language_model.layers
        for number, layer in enumerate(layers):
            layers[number] = deepcopy(layer)

    expected = talk(used(LLAVA), lambda model: None)
    assert talk(model, copy_layers).equal(expected)
    assert residue(model) == set()
