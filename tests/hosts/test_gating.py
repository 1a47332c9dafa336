"""Gates in a frozen language model: closed ones are as dropping, open ones as nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from asked_questions import HOSTS, questions, tiny
from reference import fingerprint
from test_asking import TOLERANCE, some
from torch import Tensor

from ocvtp.hosts.asked import gates_of_rows
from ocvtp.hosts.asking import Asked, Asker, before_layer, drop, read
from ocvtp.hosts.gating import (
    KEY_BIAS,
    Gate,
    Gather,
    KeyBias,
    NoGate,
    Noise,
    PolicySoftmax,
    Scale,
    build_gate,
    checkpointed,
    gating,
    list_gates,
    register_gate,
)
from ocvtp.selectors.relaxations import Gates, HardST

pytestmark = pytest.mark.sampled(3)


def of_hard(keep: Tensor, others: float = 0.0) -> Gates:
    return Gates(torch.where(keep, 1.0, others), keep)


def opened(asked: Asked) -> Gates:
    return of_hard(asked.columns >= 0)


def ask(name: str, **settings: Any) -> tuple[Any, Asked]:
    """The host, and questions whose images have no padding but where they differ in size."""
    model, processor = tiny(name)
    with Asker(model, processor) as asker:
        return asker.host, asker.ask(*questions(name, **settings))


def every_gate(host: Any, asked: Asked) -> list[Gate]:
    gates = [KeyBias(), PolicySoftmax(), Scale(), Noise("diag"), Gather("original"), NoGate()]
    for gate in gates:
        gate.build(host)
        gate.measure([asked])
    return gates


@pytest.mark.parametrize("name", HOSTS)
def test_open_gates_change_nothing(name: str) -> None:
    host, asked = ask(name)
    with torch.no_grad(), gating(host.model):
        expected = read(host, asked)
        for gate in every_gate(host, asked):
            found = read(host, asked, opened(asked), gate)
            torch.testing.assert_close(found.logits, expected.logits, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("gate", [KeyBias(floor=0), PolicySoftmax()], ids=["bias", "policy"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", HOSTS)
def test_closed_gates_are_dropping(name: str, side: str, gate: Gate) -> None:
    host, asked = ask(name, side=side)
    keep = some(asked)
    with torch.no_grad(), gating(host):
        expected = read(host, drop(asked, keep, "original"))
        found = read(host, asked, of_hard(keep), gate)
        whole = read(host, asked)
    near = 2e-5 if side == "right" else 1e-4  # other positions, which turn heads a little otherwise
    torch.testing.assert_close(found.logits, expected.logits, atol=near, rtol=1e-5)
    assert (found.logits - whole.logits).abs().max() > 0.1


@pytest.mark.parametrize("gate", [KeyBias(floor=0), PolicySoftmax()], ids=["bias", "policy"])
@pytest.mark.parametrize("name", HOSTS)
def test_closed_gates_are_dropping_before_a_layer_too(name: str, gate: Gate) -> None:
    """By attention of the whole model in which later layers do not see what was dropped."""
    host, asked = ask(name)
    with torch.no_grad():
        inside = before_layer(host, asked, 2)
        keep = some(inside)
        with gating(host):
            found = read(host, inside, of_hard(keep), gate)
        hidden = keep.new_zeros(asked.mask.shape)
        there = inside.columns >= 0
        owners = there.nonzero()[:, 0]
        hidden[owners, inside.columns[there]] = ~keep[there]
        expected = read_with_hidden(host, asked, hidden, layer=2)
    torch.testing.assert_close(found.logits, expected, atol=2e-5, rtol=1e-5)


def read_with_hidden(host: Any, asked: Asked, hidden: Tensor, layer: int) -> Tensor:
    """Logits where columns `hidden` [B, L] are masked from a layer on, by an additive mask."""
    length = asked.mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & asked.mask[:, None]
    least = torch.finfo(torch.float32).min

    def mask(module: Any, args: Any, kwargs: Any) -> Any:
        seen = causal & ~hidden[:, None] | torch.eye(length, dtype=torch.bool)
        return args, kwargs | {"attention_mask": torch.where(seen, 0.0, least)[:, None]}

    hooks = [
        module.register_forward_pre_hook(mask, with_kwargs=True)
        for module in host.language_model.layers[layer:]
    ]
    try:
        return read(host, asked).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", HOSTS)
def test_a_key_bias_is_an_additive_mask(name: str) -> None:
    """Without the mask's memory: outputs and gradients."""
    host, asked = ask(name)
    torch.manual_seed(0)
    drawn = -4 * torch.rand(asked.mask.shape)
    weights = torch.randn(asked.mask.numel(), asked.embeddings.shape[2])
    arguments = {"inputs_embeds": asked.embeddings, "position_ids": asked.positions}
    model, mask = host.language_model, torch.ones_like(asked.mask)
    length, least = asked.mask.shape[1], torch.finfo(torch.float32).min
    found = []
    for widened in (True, False):
        bias = drawn.clone().requires_grad_()
        if widened:
            with gating(host):
                more = {"attention_mask": mask.long(), KEY_BIAS: bias}
                states = model(**arguments, **more, use_cache=False).last_hidden_state
        else:
            causal = torch.full((length, length), least).triu(1)
            more = {"attention_mask": (causal + bias[:, None, None]).clamp(min=least)}
            states = model(**arguments, **more, use_cache=False).last_hidden_state
        states = states[asked.mask]
        (states * weights[: len(states)]).sum().backward()
        found.append((states.detach(), bias.grad))
    (states, gradient), (expected, theirs) = found
    torch.testing.assert_close(states, expected, **TOLERANCE)
    torch.testing.assert_close(gradient, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)
    assert float(theirs.abs().max()) > 0.01


@pytest.mark.parametrize("name", ["llava", "qwen3-vl"])
def test_a_key_bias_is_exact_in_bfloat16(name: str) -> None:
    from ocvtp.hosts.gating import _widened

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 9, 12).to(torch.bfloat16)
    bias = -9 * torch.rand(2, 9)
    wide, longer, _ = _widened(query, key, value, bias)
    assert wide.shape[-1] % 8 == 0
    added = wide.float() @ longer.float().mT - query.float() @ key.float().mT
    torch.testing.assert_close(added, bias[:, None, None].expand_as(added), atol=3e-4, rtol=0)


def gradients(gate: Gate, host: Any, asked: Asked, given: Gates) -> Tensor:
    values = given.values.clone().requires_grad_()
    with gating(host):
        answered = read(host, asked, replace(given, values=values), gate)
    answered.logits.log_softmax(dim=1).gather(1, answered.targets[:, None]).sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    return values.grad


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen3-vl"])
def test_every_token_learns(name: str) -> None:
    host, asked = ask(name)
    keep, real = some(asked), asked.columns >= 0
    for gate in every_gate(host, asked)[:4]:
        for given in (of_hard(keep), of_hard(keep, 0.3)):
            gradient = gradients(gate, host, asked, given)
            assert torch.equal(gradient != 0, real), gate.name
    drawn = torch.randn(keep.shape).requires_grad_()
    for floor in (1e-3, 0.0):
        given = HardST(tau=1.0, floor=floor)(drawn, 5, real, 0.0)
        with gating(host):
            states = read(host, asked, given, KeyBias(floor=floor)).states
        (slope,) = torch.autograd.grad(states.sum(), given.values)
        assert torch.equal(slope != 0, real if floor else given.hard)
    nothing = gradients(KeyBias(floor=0), host, asked, of_hard(keep))
    assert torch.equal(nothing != 0, keep), "what is gone learns nothing"
    gathered = gradients(Gather(), host, asked, of_hard(keep))
    assert torch.equal(gathered != 0, keep)


@pytest.mark.parametrize("name", HOSTS)
def test_gathered_tokens_are_as_dropped(name: str) -> None:
    host, asked = ask(name)
    keep = some(asked)
    soft = Gates(torch.rand(keep.shape), keep)
    with torch.no_grad():
        for positions in ("contiguous", "original"):
            found = read(host, asked, soft, Gather(positions))
            expected = read(host, drop(asked, keep, positions))
            assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("gate", [KeyBias(), PolicySoftmax()], ids=["bias", "policy"])
@pytest.mark.parametrize("name", HOSTS)
def test_layers_that_run_again_give_the_same_gradients(name: str, gate: Gate) -> None:
    host, asked = ask(name)
    layers, calls = host.language_model.layers, []
    handles = [
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1)) for layer in layers
    ]
    before = fingerprint(host.model)
    try:
        given = of_hard(some(asked), 0.2)
        expected = gradients(gate, host, asked, given)
        once = len(calls)
        with checkpointed(host.model):
            assert all(layer.training for layer in layers)
            assert not any(part.training for layer in layers for part in layer.children())
            assert not host.language_model.training
            found = gradients(gate, host, asked, given)
    finally:
        for handle in handles:
            handle.remove()
    assert once == len(layers)
    assert len(calls) == 3 * once
    torch.testing.assert_close(found, expected)
    with pytest.raises(ZeroDivisionError), checkpointed(host):
        raise ZeroDivisionError
    assert not any(layer.training for layer in layers)
    for handle in handles:
        handle.remove()
    after = fingerprint(host.model)
    assert {key for key, _ in before.items() ^ after.items() if "hook" not in key} == set()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_models_own_attention_comes_back(attention: str) -> None:
    host, asked = ask("llava")
    model, config = host.language_model, host.language_model.config
    own, tower = config._attn_implementation, host.tower.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        before = fingerprint(host.model)
        with torch.no_grad():
            expected = read(host, asked)
            with gating(host.model):
                assert config._attn_implementation == "ocvtp_gated"
                assert host.tower.config._attn_implementation == tower
                found = read(host, asked)
        torch.testing.assert_close(found.logits, expected.logits, **TOLERANCE)
        with pytest.raises(ZeroDivisionError), gating(host.model):
            raise ZeroDivisionError
        assert config._attn_implementation == attention
        assert dict(fingerprint(host.model).items() ^ before.items()) == {}
    finally:
        model.set_attn_implementation(own)


@pytest.mark.parametrize("gate", [Scale(), Noise()], ids=["scale", "noise"])
def test_rows_that_the_tower_adds_later_are_gated(gate: Gate) -> None:
    """A token that is gone does not come back by the side door."""
    host, asked = ask("qwen3-vl")
    gate.build(host)
    gate.measure([asked])
    keep = some(asked)
    made, arguments = gate.eval()(asked, of_hard(keep))
    assert arguments == {}
    assert asked.deepstack is not None
    assert made.deepstack is not None
    stays = gates_of_rows(asked.deepstack, asked.by_column(keep.float())) > 0
    rows, given = made.deepstack.rows, asked.deepstack.rows
    assert torch.equal(rows[:, stays], given[:, stays])
    if isinstance(gate, Scale):
        assert not rows[:, ~stays].any()
        return
    closed = rows[:, ~stays]
    assert not torch.isclose(closed, given[:, ~stays]).all(dim=2).any()
    other, _ = gate(replace_rows(asked, 7.0), of_hard(keep))
    torch.testing.assert_close(other.deepstack.rows[:, ~stays], closed)  # nothing of it is left


def replace_rows(asked: Asked, value: float) -> Asked:
    assert asked.deepstack is not None
    rows = torch.full_like(asked.deepstack.rows, value)
    return replace(asked, deepstack=replace(asked.deepstack, rows=rows))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen3-vl"])
def test_repeated_questions_have_gates_of_their_own(name: str) -> None:
    """As drawn sets of one question are."""
    host, asked = ask(name, pictures=(0, 0, 1))
    keeps = [some(asked, seed, share=0.1) for seed in (1, 2)]
    both = torch.stack(keeps, dim=1).flatten(0, 1)
    for gate in (KeyBias(floor=0), Scale(), Gather()):
        with torch.no_grad(), gating(host):
            found = read(host, asked.repeat(2), of_hard(both), gate)
            for number, keep in enumerate(keeps):
                expected = read(host, asked, of_hard(keep), gate)
                for row in range(len(keep)):
                    mine = found.logits[found.owner == 2 * row + number]
                    theirs = expected.logits[expected.owner == row]
                    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen3-vl"])
def test_noise_is_of_the_tokens_spread(name: str) -> None:
    host, asked = ask(name)
    gate = Noise().eval()
    with pytest.raises(RuntimeError, match=r"call build\(host\)"):
        gate(asked, opened(asked))
    gate.build(host)
    with pytest.raises(ValueError, match="must know the spread of visual tokens"):
        gate(asked, opened(asked))
    gate.measure(iter([asked, asked]))
    tokens = asked.embeddings[asked.image]
    torch.testing.assert_close(gate.mean[0], tokens.mean(dim=0))
    torch.testing.assert_close(gate.std[0], tokens.std(dim=0, correction=0))
    if asked.deepstack is not None:
        torch.testing.assert_close(gate.mean[1:], asked.deepstack.rows.mean(dim=1))
    share = 0.3
    values = torch.full(asked.columns.shape, share)
    made, _ = gate(asked, Gates(values, values > 1))
    expected = share**0.5 * tokens + (1 - share**0.5) * gate.mean[0]
    noise = (made.embeddings[asked.image] - expected) / ((1 - share) ** 0.5 * gate.std[0])
    assert abs(float(noise.mean())) < 0.05
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    text = asked.mask & ~asked.image
    assert torch.equal(made.embeddings[text], asked.embeddings[text])
    again, _ = gate(asked, Gates(values, values > 1))
    assert torch.equal(again.embeddings, made.embeddings)
    other, _ = gate(asked, Gates(values, values > 1), torch.Generator().manual_seed(5))
    assert not torch.equal(other.embeddings, made.embeddings)
    gate.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(gate(asked, Gates(values, values > 1))[0].embeddings)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    gate.eval()
    saved = Noise().eval()
    saved.build(host)
    saved.load_state_dict(gate.state_dict())
    loaded, _ = saved(asked, Gates(values, values > 1))
    assert torch.equal(loaded.embeddings, made.embeddings)


def test_a_denoiser_learns_to_tell_what_a_token_was() -> None:
    host, asked = ask("llava")
    gate = Noise("diag", dim=32)
    torch.manual_seed(0)
    gate.build(host)
    gate.measure([asked])
    given = Gates(torch.full(asked.columns.shape, 0.5), asked.columns >= 0)
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        made, _ = gate(asked, given, torch.Generator().manual_seed(step))
        loss = (made.embeddings - asked.embeddings)[asked.image].square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    made, _ = gate(asked, opened(asked))
    assert torch.equal(made.embeddings, asked.embeddings), "an open gate leaves tokens alone"


def test_a_line_of_tiles_ends_while_a_token_of_it_is_there() -> None:
    host, asked = ask("llava-next")
    assert asked.lines is not None
    assert asked.ends is not None
    keep = torch.zeros_like(asked.columns, dtype=torch.bool)
    line = int(asked.lines[0].max())
    column = int((asked.lines[0] == line).nonzero()[0])
    keep[0] = asked.columns[0] == column
    stays = asked.by_column(torch.where(keep, 0.25, 0.0))
    assert stays[0, asked.ends[0] == line].tolist() == [0.25]
    assert int((stays[0] > 0).sum()) == int((asked.mask[0] & ~asked.image[0]).sum()) + 2 + int(
        (~asked.mask[0]).sum()
    )


def test_gates_by_name() -> None:
    names = ["gather", "key_bias", "noise", "none", "policy_softmax", "scale"]
    assert list_gates() == names
    assert [type(build_gate(name)).__name__ for name in names] == [
        "Gather", "KeyBias", "Noise", "NoGate", "PolicySoftmax", "Scale"
    ]  # fmt: skip
    assert build_gate("key_bias", floor=0.25).settings() == {"floor": 0.25}
    assert build_gate("noise", dim=8).settings() == {"denoiser": "none", "dim": 8, "seed": 0}
    assert build_gate("scale").settings() == {}
    assert not build_gate("none").reads_model
    with pytest.raises(ValueError, match="unknown gate 'keybias'; did you mean 'key_bias'"):
        build_gate("keybias")
    with pytest.raises(ValueError, match="gate 'scale' has no setting 'floor'. It takes none."):
        build_gate("scale", floor=1)
    with pytest.raises(ValueError, match=r"floor=2; pass a share from 0 to 1"):
        build_gate("key_bias", floor=2)
    with pytest.raises(ValueError, match="denoiser='mlp'; pass one of none, diag"):
        build_gate("noise", denoiser="mlp")
    with pytest.raises(ValueError, match="positions='new'; pass 'contiguous' or 'original'"):
        build_gate("gather", positions="new")
    with pytest.raises(ValueError, match="gate 'scale' is registered already"):
        register_gate("scale")(Scale)


def test_gates_are_named_in_settings_by_their_class() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--gate", type=Gate)
    for cls, given in ((KeyBias, {"floor": 0.01}), (Noise, {"denoiser": "diag", "dim": 8})):
        said = {"class_path": f"ocvtp.hosts.gating.{cls.__name__}", "init_args": given}
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        made = instantiate(parser.parse_object({"gate": said})).gate
        assert type(made) is cls
        assert {name: getattr(made, name) for name in given} == given


def test_gates_in_the_attention_act_inside_of_gating_alone() -> None:
    host, asked = ask("llava")
    with pytest.raises(ValueError, match="KeyBias acts in the attention of the language model"):
        read(host, asked, opened(asked), KeyBias())
    with pytest.raises(ValueError, match="gates act through a gate"):
        read(host, asked, opened(asked))
