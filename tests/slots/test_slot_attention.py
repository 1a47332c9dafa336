"""Slot Attention against the official code."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ocvtp.slots.attention import SlotAttention, slot_winners

_NAMES = {
    "norm_in.": "norm_inputs.",
    "norm_slots_0.": "norm_slots.",
    "norm_slots_1.": "norm_ffn.",
    "proj_q.": "to_query.",
    "proj_k.": "to_key.",
    "proj_v.": "to_value.",
    "ffn.mlp.": "ffn.",
}


def _ours(name: str) -> str:
    for theirs, ours in _NAMES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


@pytest.fixture(scope="module")
def reference(vectors):
    return vectors("slot_attention")


def _module(reference, num_iterations=3, truncation="bilevel", dtype=torch.float64):
    module = SlotAttention(16, 64, num_iterations, truncation=truncation).to(dtype).eval()
    state = {_ours(k[3:]): v.to(dtype) for k, v in reference.items() if k.startswith("sd.")}
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("truncation", ["bilevel", "none"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_forward_equals_the_official_one(reference, iterations, truncation):
    module = _module(reference, iterations, truncation)
    slots, attention = module(reference["input"], reference["slots_init"])
    assert_close(slots, reference[f"slots.iter{iterations}"], rtol=0, atol=1e-10)
    assert_close(attention, reference[f"attn.iter{iterations}"], rtol=0, atol=1e-10)


def test_forward_in_fp32(reference):
    module = _module(reference, dtype=torch.float32)
    slots, attention = module(reference["input"].float(), reference["slots_init"].float())
    assert_close(slots, reference["slots.iter3.f32"], rtol=1e-5, atol=1e-5)
    assert_close(attention, reference["attn.iter3.f32"], rtol=1e-5, atol=1e-5)


def test_slot_mask(reference):
    slots, attention = _module(reference)(
        reference["input"], reference["slots_init"], reference["smask"]
    )
    assert_close(slots, reference["slots.smask"], rtol=0, atol=1e-10)
    assert_close(attention, reference["attn.smask"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", ["grad", "grad_w"])
@pytest.mark.parametrize(("truncation", "theirs"), [("bilevel", "bilevel"), ("none", "fullbp")])
def test_gradients_equal_the_official_ones(reference, truncation, theirs, loss):
    module = _module(reference, truncation=truncation)
    tokens = reference["input"].clone().requires_grad_()
    initial = reference["slots_init"].clone().requires_grad_()
    slots, _ = module(tokens, initial)
    weight = reference["loss_weight"] if loss == "grad_w" else 1.0
    (slots * weight).sum().backward()
    ours = {name: p.grad for name, p in module.named_parameters()}
    ours |= {"input": tokens.grad, "slots_init": initial.grad}
    prefix = f"{loss}.{theirs}."
    expected = {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}
    assert len(expected) == len(ours)
    for name, value in expected.items():
        assert_close(ours[_ours(name)], value.double(), rtol=1e-6, atol=1e-6, msg=name)


def test_truncations_differ(reference):
    grads = []
    for truncation in ("bilevel", "none"):
        module = _module(reference, truncation=truncation)
        module(reference["input"], reference["slots_init"])[0].sum().backward()
        grads.append(module.to_key.weight.grad)
    assert not torch.allclose(*grads)


def test_padding_tokens_change_nothing(reference):
    module = _module(reference)
    tokens = reference["input"]
    padded = torch.cat([tokens, 7 * torch.ones_like(tokens[:, :5])], dim=1)
    valid = torch.arange(padded.shape[1]) < tokens.shape[1]
    slots, attention = module(padded, reference["slots_init"], None, valid.expand(2, -1))
    assert_close(slots, reference["slots.iter3"], rtol=0, atol=1e-10)
    assert attention[:, :, tokens.shape[1] :].abs().max() == 0


def test_winners_count_a_shared_token_once():
    attention = torch.tensor([[[0.1, 0.9, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 1.0]]])
    assert slot_winners(attention).tolist() == [[False, True, True]]
    assert slot_winners(attention, tokens_per_slot=2).tolist() == [[True, True, True]]


@pytest.mark.parametrize("wrong", [{"num_iterations": 0}, {"truncation": "half"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SlotAttention(8, 16, **wrong)


def test_slots_compete_in_fp32_under_autocast():
    """In bf16 about a third of the tokens would be tied between two slots."""
    torch.manual_seed(0)
    module = SlotAttention(32, 64, truncation="none").eval()
    inputs, slots = torch.randn(2, 400, 32), torch.randn(2, 64, 32)
    seen = []
    module.gru.register_forward_pre_hook(lambda _, args: seen.extend(a.dtype for a in args))
    with torch.autocast("cpu", torch.bfloat16):
        found, attention = module(inputs, slots)
    assert (found.dtype, attention.dtype, set(seen)) == (
        torch.float32,
        torch.float32,
        {torch.float32},
    )
    first, second = attention.topk(2, dim=1).values.unbind(dim=1)
    assert (first > second).all()
    exact = module(inputs, slots)[1]
    assert (attention.argmax(dim=1) == exact.argmax(dim=1)).float().mean() > 0.97
