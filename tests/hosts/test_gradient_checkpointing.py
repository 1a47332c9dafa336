"""Blocks that run again in the backward pass do there what they did in the forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from threading import Barrier, Thread
from typing import Any

import pytest
import tiny_qwen
import torch
from reference import Inputs
from test_tower_stages import build, make_inputs
from tiny_internvl import tiny_internvl
from tiny_models import tiny_llava
from tiny_onevision import tiny_onevision
from torch import Tensor
from transformers import DynamicCache

from ocvtp import Compose, Pruner, build_pruner
from ocvtp.transformers_names import cache_name

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
    pytest.mark.sampled(2),
]
Gradients = dict[str, Tensor]
LOST = "reentrant gradient checkpointing loses their gradients; pass use_reentrant=False"


def checkpoint(model: Any, reentrant: bool) -> None:
    """By the name that the method has from 5.24 on, where there is one."""
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": reentrant})


def gradients(
    model: Any,
    pruner: Pruner | Compose,
    inputs: Inputs,
    reentrant: bool | None = None,
    late: bool = False,
    change: Callable[[Any], Any] = lambda model: model,
) -> Gradients:
    """Of one step; without checkpointing if `reentrant` is None; switched on before attaching."""
    model = change(deepcopy(model).train())
    if reentrant is not None and not late:
        checkpoint(model, reentrant)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] % 100 == 0, -100)
    with pruner(model):
        if reentrant is not None and late:
            checkpoint(model, reentrant)
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Gradients, other: Gradients) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(other[name], gradient) for name, gradient in one.items())


def ragged() -> Inputs:
    """Images of other numbers of patches that are not like their neighbours."""
    inputs = make_inputs()
    inputs["pixel_values"][1, :, :28] = 0.5
    inputs["pixel_values"][2, :, :, 14:] = -0.5
    return inputs


IN_TOWER: dict[str, Callable[[], Pruner | Compose]] = {
    "tome": lambda: build("tome"),
    "tome by r": lambda: build_pruner("tome", r=(2, -1.0)),
    "vprune": lambda: build("vprune"),
    "adaptive": lambda: build("adaptive"),
    "early": lambda: build("early"),
    "vprune, tome": lambda: Compose([build("vprune", 10), build("tome", 5)]),
    "adaptive, early": lambda: Compose([build("adaptive"), build("early", 3)]),
    "tome, divprune": lambda: Compose([build("tome", 8), build_pruner("divprune", num_keep=4)]),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", IN_TOWER.values(), ids=IN_TOWER)
def test_stages_in_the_tower(
    llava: Any, make: Callable[[], Pruner | Compose], reentrant: bool
) -> None:
    inputs = ragged()
    plain = gradients(llava, make(), inputs)
    assert sum("vision_tower" in name for name in plain) == 85
    for late in (False, True):
        assert_same(plain, gradients(llava, make(), inputs, reentrant, late))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["tome", "adaptive"])
def test_a_tower_without_cls(llava_siglip: Any, kind: str, reentrant: bool) -> None:
    plain = gradients(llava_siglip, build(kind), ragged())
    assert_same(plain, gradients(llava_siglip, build(kind), ragged(), reentrant))


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_frozen_tower_and_adapters(llava: Any, reentrant: bool) -> None:
    """Checkpointing lets the tower's input require gradients, whether or not anything learns."""

    def adapt(model: Any, targets: str) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return get_peft_model(model, config)

    for targets in (r".*language_model.*\.(q_proj|v_proj)", r".*\.(q_proj|k_proj|fc1)"):

        def change(model: Any, targets: str = targets) -> Any:
            return adapt(model, targets)

        for make in (IN_TOWER["tome"], IN_TOWER["adaptive, early"]):
            plain = gradients(llava, make(), ragged(), change=change)
            assert all("lora_" in name for name in plain)
            assert_same(plain, gradients(llava, make(), ragged(), reentrant, change=change))


def loss_of(model: Any, inputs: Inputs) -> Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] % 100 == 0, -100)
    loss: Tensor = model(**inputs, labels=labels, use_cache=False).loss
    return loss


def test_a_backward_pass_in_another_thread(llava: Any) -> None:
    """That of a GPU's is one."""
    plain, model = gradients(llava, build("tome"), make_inputs()), deepcopy(llava).train()
    checkpoint(model, reentrant=False)
    with build("tome")(model):
        thread = Thread(target=loss_of(model, make_inputs()).backward)
        thread.start()
        thread.join()
    assert_same(plain, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls in threads that begin with what this one has in its context."""

    async def run() -> list[Any]:
        return await asyncio.gather(*map(asyncio.to_thread, calls))

    return asyncio.run(run())


class Together:
    """A hook that lets two threads be in modules, and in copies of these, at the same time."""

    def __init__(self) -> None:
        self._barrier = Barrier(2)

    def __deepcopy__(self, memo: Any) -> Together:
        return self

    def __call__(self, *_: Any) -> None:
        self._barrier.wait(timeout=60)


def test_threads_after_a_backward_pass_do_not_see_each_other(llava: Any) -> None:
    gradients(llava, build("tome"), make_inputs(), reentrant=False)
    batches = [make_inputs(), make_inputs()]
    batches[1]["pixel_values"] = batches[1]["pixel_values"].flip(-1)
    settings = {"max_new_tokens": 3, "do_sample": False}
    with build_pruner("fopru", num_keep=5)(llava):
        expected = [llava.generate(**inputs, **settings) for inputs in batches]
        hook = llava.model.vision_tower.encoder.layers[1].register_forward_pre_hook(Together())
        found = at_once(*[partial(llava.generate, **inputs, **settings) for inputs in batches])
        hook.remove()
    assert all(map(torch.equal, found, expected))


def test_two_backward_passes_at_once(llava: Any) -> None:
    gradients(llava, build("tome"), make_inputs(), reentrant=False)
    batches = [make_inputs(), make_inputs()]
    batches[1]["pixel_values"] = batches[1]["pixel_values"].flip(-1)
    expected = [gradients(llava, build("tome"), inputs) for inputs in batches]
    met = deepcopy(llava)
    keys = met.model.vision_tower.encoder.layers[1].self_attn.k_proj
    keys.register_forward_pre_hook(Together())
    found = at_once(
        *[partial(gradients, met, build("tome"), inputs, reentrant=False) for inputs in batches]
    )
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["tome", "adaptive"])
def test_a_backward_pass_without_the_pruner(llava: Any, kind: str, reentrant: bool | None) -> None:
    model, inputs = deepcopy(llava).train(), ragged()
    if reentrant is not None:
        checkpoint(model, reentrant)
    with build(kind)(model):
        loss = loss_of(model, inputs)
    if reentrant is None:  # nothing runs again
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert_same(gradients(llava, build(kind), inputs), found)
        return
    with pytest.raises(ValueError, match=r"call backward\(\) before you remove it"):
        loss.backward()


def test_two_calls_before_one_backward_pass(llava: Any) -> None:
    found = []
    for reentrant in (None, False, True):
        model = deepcopy(llava).train()
        if reentrant is not None:
            checkpoint(model, reentrant)
        with build("tome")(model):
            losses = [
                model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
                for inputs in (ragged(), make_inputs(side="right"))
            ]
            sum(losses).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


HOSTS: dict[str, tuple[Callable[[], Any], Callable[[], Inputs]]] = {
    "llava": (lambda: tiny_llava("clip"), make_inputs),
    "internvl": (tiny_internvl, make_inputs),
    "qwen3": (tiny_qwen.tiny_qwen3, lambda: tiny_qwen.make_batch(tiny_qwen.ONE, "left")),
}
READING: dict[str, Callable[[], Pruner]] = {
    "fopru": lambda: build_pruner("fopru", num_keep=3),
    "scope": lambda: build_pruner("scope", num_keep=3),
    "visionzip": lambda: build_pruner("visionzip", num_keep=3),
    "prumerge": lambda: build_pruner("prumerge", num_keep=3),
    "prumerge, adaptive": lambda: build_pruner("prumerge"),
    "prumerge_plus": lambda: build_pruner("prumerge_plus", num_keep=3),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", READING.values(), ids=READING)
@pytest.mark.parametrize("host", HOSTS)
def test_what_reads_the_tower(host: str, make: Callable[[], Pruner]) -> None:
    tiny, make_batch = HOSTS[host]
    model, inputs = tiny(), make_batch()
    if host == "qwen3" and make().name != "fopru":
        with pytest.raises(ValueError, match="CLS token"):
            gradients(model, make(), inputs)
        return
    plain = gradients(model, make(), inputs)
    assert_same(plain, gradients(model, make(), inputs, reentrant=False))
    if not make().name.startswith("prumerge"):
        assert_same(plain, gradients(model, make(), inputs, reentrant=True))
        return
    with pytest.raises(ValueError, match=LOST):  # its weights depend on keys
        gradients(model, make(), inputs, reentrant=True)

    def freeze(model: Any) -> Any:
        model.model.vision_tower.requires_grad_(False)
        return model

    plain = gradients(model, make(), inputs, change=freeze)
    assert_same(plain, gradients(model, make(), inputs, reentrant=True, change=freeze))


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_tiles(reentrant: bool) -> None:
    from matrix.families import FAMILIES, SEVERAL

    family = next(family for family in FAMILIES if family.host == "llava_onevision")
    inputs = family.make(SEVERAL, "left")
    for make in (IN_TOWER["tome by r"], IN_TOWER["adaptive"]):
        plain = gradients(tiny_onevision(), make(), inputs)
        assert_same(plain, gradients(tiny_onevision(), make(), inputs, reentrant))


@pytest.mark.parametrize("own_cache", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_dropping_in_the_language_model_is_refused(
    llava: Any, reentrant: bool, own_cache: bool, late: bool
) -> None:
    model, inputs = deepcopy(llava).train(), make_inputs()
    if own_cache:
        inputs[cache_name()] = DynamicCache(config=model.config.get_text_config())
    if not late:
        checkpoint(model, reentrant)
    with build_pruner("fastv", stages=((1, 5),))(model):
        if late:
            checkpoint(model, reentrant)
        with pytest.raises(
            ValueError, match=r"only with a cache; .*gradient_checkpointing_disable"
        ):
            model(**inputs)
