"""Models inside wrappers, compiled, offloaded, with adapters, under training."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import ask, assert_close, best_by_cls, fingerprint, shorten
from torch import Tensor, nn

from ocvtp import Pruner
from ocvtp.hosts import find_host

pytestmark = pytest.mark.usefixtures("untouched")


class DataParallelLike(nn.Module):
    """Like DDP, it keeps the model as `module` and runs its __call__."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@torch.no_grad()
def test_ddp_is_unwrapped(llava: Any, pruner: Pruner, inputs: Any) -> None:
    wrapped = DataParallelLike(llava)
    with pruner(llava):
        expected = llava(**inputs).logits
    with pruner(wrapped):
        assert torch.equal(wrapped(**inputs).logits, expected)


@pytest.mark.slow
def test_wrappers_are_taken_off_one_by_one(llava: Any) -> None:
    model = deepcopy(llava)
    assert find_host(torch.compile(model)).model is model
    wrapped = DataParallelLike(torch.compile(lora(llava)))
    assert find_host(wrapped).model is wrapped.module._orig_mod.get_base_model()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_compiled_models_prune(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor, when: str
) -> None:
    model = deepcopy(llava)
    expected = llava(**inputs).logits
    torch.compiler.reset()
    if when == "before":
        compiled = torch.compile(model, backend="eager")
        assert_close(compiled(**inputs).logits, expected, 1e-5)
    with pruner(model if when == "after" else compiled):
        if when == "after":
            compiled = torch.compile(model, backend="eager")
        short = shorten(llava, inputs, best_by_cls(llava, inputs["pixel_values"], 5))
        real = short.mask.bool()
        assert_close(compiled(**inputs).logits[real], short.logits()[real], 1e-5)
        assert torch.equal(ask(compiled, inputs), answer)
    assert_close(compiled(**inputs).logits, expected, 1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_what_a_pruner_does_is_not_compiled(llava: Any, pruner: Pruner, inputs: Any) -> None:
    """Of a compiled model, graphs are made of the language model alone."""
    graphs = list[Any]()

    def backend(graph: Any, given: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, counts = deepcopy(llava), list[int]()
    for around in (nullcontext(), pruner(model)):
        torch.compiler.reset()
        graphs.clear()
        with around:
            torch.compile(model, backend=backend)(**inputs)
        counts.append(len(graphs))
    assert 0 < counts[1] < counts[0]


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_function_attaches(llava: Any, pruner: Pruner, inputs: Any) -> None:
    with pruner(llava):
        expected = llava(**inputs).logits

    @torch.compile(backend="eager")
    def call() -> Tensor:
        with pruner(llava):
            return llava(**inputs).logits

    torch.compiler.reset()
    assert_close(call(), expected, 1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_tower_is_looked_into(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor
) -> None:
    model = deepcopy(llava)
    torch.compiler.reset()
    model.model.vision_tower.compile(backend="eager")
    model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    with pruner(model):
        assert torch.equal(ask(model, inputs), answer)


@pytest.mark.slow
def test_compiled_decoding_reads_prompts_in_chunks(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor
) -> None:
    from transformers import CompileConfig

    model = deepcopy(llava)
    torch.compiler.reset()
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compiling}
    with pruner(model):
        said = ask(model, inputs, **settings, prefill_chunk_size=7)
        assert hasattr(model, "_compiled_call")
        assert torch.equal(said, answer)


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q_proj|v_proj)"
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(deepcopy(model), config)


def test_peft_models_prune_and_train(llava: Any, pruner: Pruner, inputs: Any) -> None:
    model = lora(llava)
    inner = model.get_base_model()
    ask(model, inputs)  # PEFT leaves an attribute behind
    before = fingerprint(model)
    short = shorten(inner, inputs, best_by_cls(llava, inputs["pixel_values"], 5))
    real = short.mask.bool()
    assert (
        short.logits() - shorten(llava, inputs, [[0, 1, 2, 3, 4]] * 3).logits()
    ).abs().max() > 0.1
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] % 100 == 0, -100)
    with pruner(model):
        output = model(**inputs, labels=labels)
        output.loss.backward()
        assert torch.equal(ask(model, inputs), short.greedy(5))
    assert_close(output.logits[real], short.logits()[real])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.abs().max() > 0
        else:
            assert parameter.grad is None
    model.zero_grad(set_to_none=True)
    assert fingerprint(model) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    llava: Any, pruner: Pruner, inputs: Any, reentrant: bool
) -> None:
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] % 100 == 0, -100)
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = lora(llava).train()
        seen: list[int] = []
        norm = model.get_base_model().model.language_model.layers[1].input_layernorm
        norm.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with pruner(model):
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
        calls.append(len(seen))
    assert calls == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain, 1e-5)


def test_offloaded_models_prune(llava: Any, pruner: Pruner, inputs: Any, answer: Tensor) -> None:
    from accelerate import cpu_offload

    model = cpu_offload(deepcopy(llava), execution_device="cpu")
    before = fingerprint(model)
    forward = model.__dict__["forward"]
    with pruner(model):
        assert torch.equal(ask(model, inputs), answer)
    assert model.__dict__["forward"] is forward
    assert fingerprint(model).keys() == before.keys()
