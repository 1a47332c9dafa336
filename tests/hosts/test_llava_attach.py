"""Attaching leaves no trace, and works on wrapped, copied and shared models."""

from __future__ import annotations

import functools
import inspect
import io
from copy import deepcopy
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from reference import (
    BATCH,
    GREEDY,
    ONE,
    SEVERAL,
    Scripted,
    ask,
    best_by_cls,
    fingerprint,
    make_batch,
    shorten,
)
from tiny_models import tiny_llava
from torch import Tensor, nn

from ocvtp import Needs, Pruner, attach, build_pruner
from ocvtp.hosts import find_host
from ocvtp.hosts.families.llava import LlavaHost
from ocvtp.hosts.loading import load_model

pytestmark = pytest.mark.usefixtures("untouched")


@torch.no_grad()
def test_removing_leaves_the_model_as_it_was(llava: Any, pruner: Pruner, inputs: Any) -> None:
    before, logits = fingerprint(llava), llava(**inputs).logits
    handle = attach(llava, pruner)
    assert fingerprint(llava) != before
    assert not torch.equal(llava(**inputs).logits, logits)
    llava.generate(**inputs, **GREEDY)
    handle.remove()
    handle.remove()
    assert fingerprint(llava) == before
    assert torch.equal(llava(**inputs).logits, logits)


def test_an_old_handle_does_not_remove_a_new_pruner(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor
) -> None:
    old = attach(llava, build_pruner("none"))
    old.remove()
    with pruner(llava):
        old.remove()
        assert torch.equal(ask(llava, inputs), answer)


def test_wrappers_of_others_stay(llava: Any, pruner: Pruner, inputs: Any, answer: Tensor) -> None:
    model = deepcopy(llava)
    expected = ask(model, inputs)
    calls = []

    def spied(function: Any) -> Any:
        @functools.wraps(function)
        def spy(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return function(*args, **kwargs)

        return spy

    model.forward = spied(model.forward)  # before ours
    handle = attach(model, pruner)
    model.generate = spied(model.generate)  # around ours
    assert torch.equal(ask(model, inputs), answer)
    assert len(calls) == 6
    handle.remove()
    assert torch.equal(ask(model, inputs), expected)
    assert len(calls) == 12
    assert {"forward", "generate"} <= model.__dict__.keys()


@torch.no_grad()
def test_exceptions_leave_the_model_as_it_was(llava: Any, pruner: Pruner, inputs: Any) -> None:
    before, logits = fingerprint(llava), llava(**inputs).logits

    def fail(*args: Any) -> None:
        raise RuntimeError("on purpose")

    for where in ({"logits_processor": [fail]}, {"stopping_criteria": [fail]}):
        with pytest.raises(RuntimeError, match="on purpose"), pruner(llava):
            llava.generate(**inputs, **GREEDY, **where)
        assert fingerprint(llava) == before
    with pytest.raises(RuntimeError, match="on purpose"), pruner(llava, on_prune=fail):
        llava(**inputs)
    assert fingerprint(llava) == before
    assert torch.equal(llava(**inputs).logits, logits)


def test_an_exception_does_not_leak_into_the_next_call(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("on purpose")

    with pruner(llava):
        with pytest.raises(RuntimeError, match="on purpose"):
            llava.generate(**make_batch(ONE), **GREEDY, logits_processor=[fail])
        assert torch.equal(ask(llava, inputs), answer)


def test_a_refused_pruner_leaves_no_hooks(llava: Any) -> None:
    before = fingerprint(llava)
    for needs in (
        Needs(hidden=(1, 8)),
        Needs(hidden=(1,), attention=((0, "cls"), (6, "received"))),
        Needs(hidden=(1,), keys=(-7,)),
    ):
        with pytest.raises(ValueError, match="does not exist in this tower"):
            attach(llava, Scripted(wants=needs))
        assert fingerprint(llava) == before


@torch.no_grad()
def test_hooks_are_silent_outside_of_pruned_calls(llava: Any, inputs: Any) -> None:
    everything = Needs(
        hidden=(0, 3, -1),
        attention=((1, "cls"), (2, "received"), (3, "given")),
        keys=(4,),
        cls=True,
    )
    pruner = Scripted(wants=everything)
    expected = llava.model.get_image_features(inputs["pixel_values"], return_dict=True)
    with pruner(llava):
        actual = llava.model.get_image_features(inputs["pixel_values"], return_dict=True)
        kept = [value for module in llava.modules() for value in vars(module).values()]
        llava(**inputs)
        after = [value for module in llava.modules() for value in vars(module).values()]
    assert len(pruner.seen) == 1
    assert list(map(id, kept)) == list(map(id, after))
    for ours, theirs in zip(actual.pooler_output, expected.pooler_output, strict=True):
        assert torch.equal(ours, theirs)


def test_a_tower_keeps_its_fast_attention(
    llava: Any, pruner: Pruner, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fast = nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape)
        return fast(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    with pruner(llava), torch.no_grad():
        llava(**inputs)
    assert llava.model.vision_tower.config._attn_implementation == "sdpa"
    assert sum(shape[-2] == 17 for shape in calls) == 5  # of 6: layer -2 is read


def test_a_second_pruner_is_refused_and_the_first_stays(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor
) -> None:
    with pruner(llava):
        with pytest.raises(ValueError, match="attached to this model already; remove it first"):
            attach(llava, build_pruner("none"))
        assert torch.equal(ask(llava, inputs), answer)


def test_copies_of_an_attached_model_prune_on_their_own(
    llava: Any, pruner: Pruner, inputs: Any, answer: Tensor
) -> None:
    with pruner(llava):
        other = deepcopy(llava)
        assert torch.equal(ask(other, inputs), answer)
        other.lm_head.weight.data.neg_()
        assert torch.equal(ask(llava, inputs), answer)
        assert not torch.equal(ask(other, inputs), answer)
    other.lm_head.weight.data.neg_()
    assert torch.equal(ask(other, inputs), answer)


def test_an_attached_model_pickles(pruner: Pruner, inputs: Any, answer: Tensor) -> None:
    # A fresh one: at its first call, transformers installs hooks that do not pickle.
    stream, fresh = io.BytesIO(), tiny_llava("clip")
    with pruner(fresh):
        torch.save(fresh, stream)
    stream.seek(0)
    assert torch.equal(ask(torch.load(stream, weights_only=False), inputs), answer)


def test_threads_do_not_see_each_other(llava: Any, pruner: Pruner) -> None:
    unattached = deepcopy(llava)
    jobs = [(llava, make_batch(rows, seed=seed)) for rows in (ONE, SEVERAL) for seed in (0, 1)]
    expected = []
    for _, inputs in jobs:
        short = shorten(llava, inputs, best_by_cls(llava, inputs["pixel_values"], 5))
        expected.append(short.greedy(5))
    jobs.append((unattached, make_batch(BATCH)))
    expected.append(ask(*jobs[-1]))
    actual: dict[int, list[Tensor]] = {i: [] for i in range(len(jobs))}
    start = Barrier(len(jobs))

    def work(number: int) -> None:
        start.wait()
        actual[number] += [ask(*jobs[number]) for _ in range(3)]

    with pruner(llava):
        threads = [Thread(target=work, args=(number,)) for number in actual]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, answers in actual.items():
        assert len(answers) == 3
        assert all(torch.equal(answer, expected[number]) for answer in answers)


def test_the_signatures_are_the_models_own(llava: Any, pruner: Pruner) -> None:
    def signatures() -> list[inspect.Signature]:
        return [inspect.signature(getattr(llava, name)) for name in ("forward", "generate")]

    before = signatures()
    with pruner(llava):
        assert signatures() == before


def test_weights_are_saved_as_without_a_pruner(llava: Any, pruner: Pruner, tmp_path: Any) -> None:
    expected = llava.state_dict().keys()
    with pruner(llava):
        assert llava.state_dict().keys() == expected
        llava.save_pretrained(tmp_path)
    again = type(llava).from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, llava.lm_head.weight)


def test_supported_models_describe_themselves(llava: Any, llava_siglip: Any) -> None:
    for model in (llava, llava_siglip):
        stages = ["pixels", "encoder", "llm_input", "llm_layers"]
        assert find_host(model).describe() == {
            "model_type": "llava",
            "stages": stages,
            "savings": {"cut_tower": True, "project_kept": True, "compile_select": False},
        }


def test_a_pipeline_prunes(pruner: Pruner) -> None:
    from PIL import Image
    from transformers import pipeline

    model, processor = load_model("random:tiny-llava")
    image = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    talk = [{"role": "user", "content": content}]
    settings = {"max_new_tokens": 6, "do_sample": False}
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    inputs = processor.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompts: list[Any] = []
    with pruner(model, on_prune=prompts.append):
        said = pipe(text=talk, generate_kwargs=settings, return_full_text=False)
        expected = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert prompts[0].summary()["visual_tokens_kept"] == [5]
    assert said[0]["generated_text"] == processor.decode(expected, skip_special_tokens=True)


def test_an_attach_that_fails_late_leaves_nothing(
    llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(llava)

    def fail(*args: Any) -> None:
        raise TypeError("late")

    monkeypatch.setattr(LlavaHost, "hooks", fail)
    with pytest.raises(TypeError, match="late"):
        attach(llava, build_pruner("fastervlm", num_keep=5))
    monkeypatch.undo()
    assert fingerprint(llava) == before
    attach(llava, build_pruner("fastervlm", num_keep=5)).remove()
