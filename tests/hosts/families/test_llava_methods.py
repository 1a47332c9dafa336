"""What stands for a model's methods are bound methods, which other libraries wrap and unwrap."""

from __future__ import annotations

import functools
import inspect
import io
from copy import deepcopy
from types import MethodType
from typing import Any

import pytest
import torch
from reference import GREEDY, ask, best_by_cls, fingerprint, shorten
from tiny_models import tiny_llava
from torch import Tensor

from ocvtp import Pruner, attach

pytestmark = pytest.mark.usefixtures("untouched")
NAMES = ("forward", "generate")


def residue(model: Any) -> set[str]:
    """Attributes and hooks of ours anywhere in a model."""
    found = set()
    for name, module in model.named_modules():
        found |= {f"{name}.{key}" for key in vars(module) if "ocvtp" in key}
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in hooks.values():
                hook = getattr(hook, "func", hook)
                if hook.__module__.startswith("ocvtp"):
                    found.add(f"{name} {hook}")
    return found


def test_they_are_bound_methods_of_the_model(llava: Any, pruner: Pruner) -> None:
    with pruner(llava):
        for module, name in [
            *((llava, name) for name in NAMES),
            (llava.model.multi_modal_projector, "forward"),
            (llava.model.vision_tower.encoder.layers[0], "forward"),
        ]:
            method = getattr(module, name)
            assert name in vars(module)
            assert isinstance(method, MethodType)
            assert method.__self__ is module
            assert method.__name__ == name
            assert method.__doc__ == getattr(type(module), name).__doc__
            assert inspect.unwrap(method) is method.__wrapped__
            own = inspect.signature(getattr(type(module), name).__get__(module))
            assert inspect.signature(method) == own


@torch.no_grad()
def test_what_they_wrap_prunes_too(llava: Any, pruner: Pruner, inputs: Any, answer: Tensor) -> None:
    length = inputs["input_ids"].shape[1]
    with pruner(llava):
        logits = llava(**inputs).logits
        assert llava.forward.__wrapped__(llava, **inputs).logits.equal(logits)
        for generate in (llava.generate.__func__, llava.generate.__wrapped__):
            said = generate(llava, **inputs, **GREEDY)
            assert said[:, length:].equal(answer)
        kept = (llava.generate.__wrapped__, llava.forward.__wrapped__, llava.forward)
    expected = llava.generate(**inputs, **GREEDY)
    assert kept[0](llava, **inputs, **GREEDY).equal(expected)
    logits = llava(**inputs).logits
    assert kept[1](llava, **inputs).logits.equal(logits)
    assert kept[2](**inputs).logits.equal(logits)


def test_answers_are_generated_with_gradients(llava: Any, pruner: Pruner, inputs: Any) -> None:
    model = deepcopy(llava)
    settings = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    short = shorten(model, inputs, best_by_cls(model, inputs["pixel_values"], 5))
    expected = short.logits()[:, -1].logsumexp(dim=-1).sum()
    parameters = [model.lm_head.weight, model.model.multi_modal_projector.linear_1.weight]
    gradients = torch.autograd.grad(expected, parameters)
    with pruner(model):
        assert not model.generate(**inputs, **settings).logits[0].requires_grad
        output = model.generate.__wrapped__(model, **inputs, **settings)
    actual = torch.autograd.grad(output.logits[0].logsumexp(dim=-1).sum(), parameters)
    for ours, theirs in zip(actual, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_classs_own_generate_says_why_it_cannot_prune(
    llava: Any, pruner: Pruner, inputs: Any
) -> None:
    own = type(llava).generate
    with pruner(llava), pytest.raises(ValueError, match=r"model\.generate\(\.\.\.\).*__wrapped__"):
        own.__wrapped__(llava, **inputs, **GREEDY)
    with pruner(llava):  # nothing to prune
        text = {k: v for k, v in inputs.items() if k != "pixel_values"}
        text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == 100, 5)
        expected = llava.generate(**text, **GREEDY)
        assert own.__wrapped__(llava, **text, **GREEDY).equal(expected)


def prepared(model: Any) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    return accelerator, accelerator.prepare_model(model, evaluation_mode=True)


@pytest.mark.parametrize("first", ["accelerate", "pruner"])
@pytest.mark.parametrize("last", ["accelerate", "pruner"])
def test_accelerate_unwraps_models(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor, first: str, last: str
) -> None:
    model = deepcopy(llava)
    expected = ask(model, inputs)
    handle = attach(model, pruner) if first == "pruner" else None
    accelerator, model = prepared(model)
    in_half = ask(model, inputs)
    if handle is None:
        handle = attach(model, pruner)
        assert not ask(model, inputs).equal(in_half)
    if last == "accelerate":
        handle.remove()
        if first == "accelerate":
            assert ask(model, inputs).equal(in_half)
        assert accelerator.unwrap_model(model, keep_fp32_wrapper=False) is model
    else:
        assert accelerator.unwrap_model(model, keep_fp32_wrapper=False) is model
        assert ask(model, inputs).equal(answer)
        with torch.no_grad():
            assert model(**inputs).logits.dtype == torch.float32
        handle.remove()
        assert not {*NAMES} & vars(model).keys()
    assert ask(model, inputs).equal(expected)
    assert residue(model) == set()
    with pruner(model):
        assert ask(model, inputs).equal(answer)
    assert ask(model, inputs).equal(expected)


@pytest.mark.slow
def test_accelerate_wraps_again_what_it_unwrapped(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor
) -> None:
    model = deepcopy(llava)
    expected = ask(model, inputs)
    handle = attach(model, pruner)
    for _ in range(2):
        accelerator, model = prepared(model)
        ask(model, inputs)
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert ask(model, inputs).equal(answer)
    handle.remove()
    assert ask(model, inputs).equal(expected)
    assert residue(model) == set()


def test_hooks_of_accelerate_come_and_go(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor
) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = deepcopy(llava)
    expected = ask(model, inputs)
    handle = attach(model, pruner)
    add_hook_to_module(model, ModelHook())
    assert ask(model, inputs).equal(answer)
    remove_hook_from_module(model)
    assert ask(model, inputs).equal(answer)
    add_hook_to_module(model, ModelHook())
    handle.remove()
    assert ask(model, inputs).equal(expected)
    with pruner(model):
        assert ask(model, inputs).equal(answer)
    remove_hook_from_module(model)
    assert ask(model, inputs).equal(expected)
    assert residue(model) == set()


def test_methods_that_were_wrapped_by_others_pass_after_removal(
    llava: Any, inputs: Any, pruner: Pruner, answer: Tensor
) -> None:
    model, calls = deepcopy(llava), []
    expected = ask(model, inputs)

    def spy(name: str, label: int) -> None:
        function = getattr(model, name)

        @functools.wraps(function)
        def spied(*args: Any, **kwargs: Any) -> Any:
            calls.append(label)
            return function(*args, **kwargs)

        setattr(model, name, spied)

    for label in range(3):
        for name in NAMES:
            spy(name, label)
        with pruner(model):
            for name in NAMES:
                spy(name, label + 10)
            assert ask(model, inputs).equal(answer)
            assert {*calls} == {*range(label + 1), *range(10, 11 + label)}
        calls.clear()
        assert ask(model, inputs).equal(expected)
        assert {*calls} == {*range(label + 1), *range(10, 11 + label)}
        calls.clear()


def test_copies_run_what_stood_in_the_copy_before(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor
) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = deepcopy(llava)
    add_hook_to_module(model, ModelHook())
    with pruner(model):
        other = deepcopy(model)
    assert other.forward.__self__ is other
    other.lm_head.weight.data.neg_()
    assert not ask(other, inputs).equal(answer)
    other.lm_head.weight.data.neg_()
    assert ask(other, inputs).equal(answer)
    assert not ask(model, inputs).equal(answer)


def test_pickled_models_have_bound_methods(pruner: Pruner, inputs: Any, answer: Tensor) -> None:
    stream, fresh = io.BytesIO(), tiny_llava("clip")
    with pruner(fresh):
        torch.save({"methods": [fresh.generate, fresh.forward], "model": fresh}, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    model = loaded["model"]
    assert loaded["methods"] == [model.generate, model.forward]
    for name in NAMES:
        assert getattr(model, name).__self__ is model
    again = io.BytesIO()
    torch.save(model, again)
    assert ask(model, inputs).equal(answer)
    again.seek(0)
    assert ask(torch.load(again, weights_only=False), inputs).equal(answer)


def test_fabric_marks_them(llava: Any, pruner: Pruner, inputs: Any, answer: Tensor) -> None:
    from lightning_fabric.wrappers import _FabricModule

    with pruner(llava):
        wrapped = _FabricModule(llava, strategy=None)
        wrapped.mark_forward_method("generate")
        wrapped.mark_forward_method(llava.generate)
        assert ask(wrapped, inputs).equal(answer)


def test_removing_twice_or_late_leaves_nothing(llava: Any, pruner: Pruner) -> None:
    before = fingerprint(llava)
    handle = attach(llava, pruner)
    kept = llava.forward
    handle.remove()
    assert fingerprint(llava) == before
    llava.forward = kept
    handle.remove()
    del llava.forward
    assert fingerprint(llava) == before
