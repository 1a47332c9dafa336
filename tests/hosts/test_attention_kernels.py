"""Other attention than sdpa, chosen before a pruner is attached or while it is."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import tiny_models
import torch
from reference import ask, assert_close
from test_gradient_checkpointing import ragged
from test_tower_stages import build, make_inputs

from ocvtp import Pruner, build_pruner

STAGES: dict[str, Callable[[], Pruner]] = {
    "fopru": lambda: build_pruner("fopru", num_keep=5),
    "vprune": lambda: build("vprune"),
    "early": lambda: build("early"),
    "fastv": lambda: build_pruner("fastv", stages=((1, 5),)),
    "sparsevlm": lambda: build_pruner("sparsevlm", stages=((1, 5),)),
}
NO_BIAS = (
    "attention is 'flex_attention', which takes no bias for rows of other sizes; load .*"
    r"model\.set_attn_implementation\(\{'vision_config': 'sdpa'\}\)"
)


@pytest.mark.parametrize("where", ["model", "tower"])
@pytest.mark.parametrize("kind", ["tome", "adaptive"])
def test_rows_of_other_sizes_need_a_bias(llava: Any, kind: str, where: str) -> None:
    model, inputs = deepcopy(llava), ragged()
    switched = model if where == "model" else model.model.vision_tower
    with build(kind)(model):
        expected = ask(model, inputs)
        switched.set_attn_implementation("flex_attention")
        with pytest.raises(ValueError, match=NO_BIAS):
            model(**inputs)
        with pytest.raises(ValueError, match=NO_BIAS):
            model.generate(**inputs, max_new_tokens=2)
        model.set_attn_implementation("sdpa")
        assert torch.equal(ask(model, inputs), expected)
        model.set_attn_implementation({"vision_config": "eager"})  # the remedy is a way to say it
        assert torch.equal(ask(model, inputs), expected)
    switched.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=NO_BIAS):
        build(kind)(model).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vprune", "fastv"])
@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # its arithmetic, without a kernel for every length
def test_flex_attention_says_what_sdpa_does(kind: str) -> None:
    model, inputs = tiny_models.tiny_llava("clip"), make_inputs()
    with STAGES[kind]()(model):
        expected, answer = model(**inputs).logits, ask(model, inputs)
        model.set_attn_implementation("flex_attention")
        logits = model(**inputs).logits
        assert torch.equal(ask(model, inputs), answer)
    real = expected.abs().sum(dim=2) > 0  # padding may be anything
    real &= logits.abs().sum(dim=2) > 0
    assert_close(logits[real], expected[real], 1e-4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", STAGES.values(), ids=STAGES)
@torch.no_grad()
def test_attention_and_states_that_are_asked_for(llava: Any, make: Callable[[], Pruner]) -> None:
    """They are of the columns that a layer reads, and change nothing."""
    model, inputs = deepcopy(llava), make_inputs()
    model.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    with make()(model):
        expected, answer = model(**inputs).logits, ask(model, inputs)
        output = model(**inputs, **asked)
        whole = model.generate(
            **inputs, **asked, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
    assert torch.equal(output.logits, expected)
    assert torch.equal(whole.sequences[:, -5:], answer)
    read = [states.shape[1] for states in output.hidden_states[1:]]
    assert [weights.shape[2:] for weights in output.attentions] == [(n, n) for n in read]
    for one, other in zip(output.attentions, whole.attentions[0], strict=True):
        assert_close(one, other, 1e-5)
    dropped = make().stage == "llm_layers"
    assert (read[1] < read[0]) == dropped
    for weights in output.attentions:
        assert_close(weights.sum(dim=3), torch.ones_like(weights[..., 0]), 1e-5)
