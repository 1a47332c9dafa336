"""Images that are encoded once for many pruners give what they give to each alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import IMG, ONE, SEVERAL, Scripted, ask, fingerprint, make_batch, make_prompts
from reference_internvl import make_internvl
from reference_next import make_next
from tiny_models import tiny_llava
from tiny_qwen import BATCH as SIZES
from tiny_qwen import make_batch as make_qwen_batch
from tiny_qwen import tiny_qwen
from torch import Tensor, nn

from ocvtp import Compose, Needs, OCPruner, Pruner, attach, build_pruner
from ocvtp.hosts import find_host
from ocvtp.hosts.families.llava import LlavaHost
from ocvtp.hosts.runtime.shared_encodings import SharedEncodings
from ocvtp.slots import OCPrunerConfig

pytestmark = pytest.mark.sampled(2)

ROWS = ["USER: <image>\nwhat is it? ASSISTANT:", "USER: <image>\n<image>\nthe same? ASSISTANT:"]
OTHER_ROWS = ["USER: <image>\nwho? ASSISTANT:", "USER: <image>\n<image>\nwhere? ASSISTANT:"]
Anything = Pruner | Compose


def learned() -> Pruner:
    torch.manual_seed(0)
    sizes = {"feature_dim": 32, "hidden_dim": 16, "slot_dim": 8, "ffn_dim": 16}
    network = OCPruner(OCPrunerConfig(**sizes, grid_hw=(4, 4), layer=3)).eval()
    return build_pruner("ocvtp", num_keep=6, network=network)


def sweep(*names: str) -> list[Anything]:
    """Pruners of every kind that all models serve, and these."""
    everywhere = ["none", "random", "divprune", "fopru", "fastv", "zspaprune"]
    settings: dict[str, Any] = {"hiprune": {"num_keep": 6, "object_block": 2}}
    settings |= dict.fromkeys(("fastv", "topv"), {"stages": ((1, 6),)})
    pruners: list[Anything] = []
    for name in (*everywhere, *names):
        pruners.append(build_pruner(name, **settings.get(name, {"num_keep": 6})))
    later = build_pruner("fastv", stages=((1, 3),))
    return [*pruners, Compose([build_pruner("divprune", num_keep=9), later])]


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Counts runs of the vision tower."""
    runs: list[int] = []
    hook = find_host(model).tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        yield runs
    finally:
        hook.remove()


@torch.no_grad()
def results(model: Any, pruner: Anything, inputs: Any, **options: Any) -> list[Tensor]:
    """What a pruner leaves and what the model makes of it, in forward() and generate()."""
    prompts: list[Any] = []
    with pruner(model, on_prune=prompts.append, **options):
        logits, answer = model(**inputs).logits, ask(model, inputs)
    assert len(prompts) == 2
    found = [logits, answer]
    for prompt in prompts:
        found += [prompt.selection.keep_indices, prompt.keep, prompt.embeddings]
    return found


def same_as_alone(
    model: Any, pruner: Anything, inputs: Any, shared: SharedEncodings, **options: Any
) -> bool:
    """Whether sharing changes nothing."""
    alone = results(model, pruner, inputs, **options)
    together = results(model, pruner, inputs, **options, shared=shared)
    return all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def check_equal(model: Any, inputs: Any, pruners: list[Anything], **options: Any) -> int:
    """Bit for bit with and without sharing; returns how often the images were encoded."""
    model.generate(**inputs, max_new_tokens=1)  # transformers installs hooks of its own
    expected = [results(model, pruner, inputs, **options) for pruner in pruners]
    before = fingerprint(model)
    shared = SharedEncodings.of(model, pruners)
    with counted(model) as runs:
        for pruner, alone in zip(pruners, expected, strict=True):
            together = results(model, pruner, inputs, **options, shared=shared)
            for a, b in zip(together, alone, strict=True):
                assert torch.equal(a, b), pruner.name
    changed = {key for key, _ in fingerprint(model).items() ^ before.items()}
    assert changed <= {"model.rope_deltas."}  # of Qwen, by every call
    assert len(runs) == shared.num_encoded
    answers = {tuple(alone[1].flatten().tolist()) for alone in expected}
    assert len(answers) > 2  # pruners matter
    return shared.num_encoded


@pytest.mark.slow
def test_llava(llava: Any, processor: Any, clip: Any) -> None:
    pruners = sweep("hiprune", "fastervlm", "prumerge", "visionzip", "trim", "cdpruner", "topv")
    later = build_pruner("visiondrop", num_keep=12, stages=((1, 8), (2, 4)), later=True)
    inputs = make_prompts(processor, ROWS)
    options = {"processor": processor, "text_tower": clip}
    # Pruners disagree on what `received` attention is: twice.
    assert check_equal(llava, inputs, [*pruners, learned(), later], **options) == 2


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["per_image", "per_tile"])
@pytest.mark.filterwarnings("ignore:the processor")
def test_llava_next(llava_next: Any, budget: Any) -> None:
    pruners = sweep("fastervlm", "prumerge", "visionzip")
    inputs = make_next([(5, IMG, 4), (3, IMG, 2, IMG, 6)])
    assert check_equal(llava_next, inputs, pruners, budget=budget) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the processor")
def test_qwen() -> None:
    pruners = sweep()
    assert check_equal(tiny_qwen(), make_qwen_batch(SIZES), pruners) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the processor")
def test_internvl(internvl: Any) -> None:
    pruners = sweep("fastervlm", "prumerge")
    inputs = make_internvl([(5, IMG, 4), (3, IMG, 2, IMG, 6)])
    assert check_equal(internvl, inputs, pruners) == 1


# ------------------------------------------------------------------------------------ what is shown


EVERYTHING = Needs(
    hidden=(1, -2),
    attention=((2, "cls"), (3, "received"), (-2, "given")),
    keys=(-2,),
    cls=True,
    projected=True,
    text=True,
)


@torch.no_grad()
def test_a_pruner_is_shown_what_it_reads_and_no_more(llava: Any, processor: Any) -> None:
    inputs = make_prompts(processor, ROWS)
    several = [Needs(), Needs(hidden=(-2,)), Needs(keys=(-2,)), Needs(cls=True), EVERYTHING]
    several += [Needs(attention=((-2, "given"),), projected=True), Needs(text=True)]
    pruners = [Scripted(wants=needs) for needs in several]
    shared = SharedEncodings.of(llava, pruners)
    for pruner in pruners:
        for options in ({}, {"shared": shared}):
            with pruner(llava, processor=processor, **options):
                llava(**inputs)
    assert shared.num_encoded == 1
    for pruner in pruners:
        alone, together = map(vars, pruner.seen)
        for name, value in alone.items():
            held = value if isinstance(value, dict) else {"": value}
            others = together[name] if isinstance(value, dict) else {"": together[name]}
            if name != "hidden" or not pruner.wants.cls:  # the layer of the CLS may be there
                assert held.keys() == others.keys(), name
            for key, other in others.items():
                same = torch.equal(held[key], other) if isinstance(other, Tensor) else True
                assert same, name
                assert (held[key] is None) == (other is None), name


@torch.no_grad()
def test_nothing_is_copied(llava: Any) -> None:
    inputs = make_batch(ONE)
    first, second = (Scripted(wants=Needs(hidden=(2,), projected=p)) for p in (True, False))
    shared = SharedEncodings.of(llava, [first, second])
    for pruner in (first, second):
        with pruner(llava, shared=shared):
            llava(**inputs)
    (one,), (two,) = first.seen, second.seen
    assert one.features is two.features
    assert one.hidden[2] is two.hidden[2]
    assert two.projected is None


def test_two_meanings_of_received_attention_are_kept_apart(llava: Any) -> None:
    received, given = ((3, "received"),), ((3, "given"),)
    several = [
        Needs(attention=given, patch_queries=True),  # does not read what it speaks of
        Needs(attention=received),
        Needs(attention=received, patch_queries=True),
    ]
    inputs, pruners = make_batch(ONE), [Scripted(wants=needs) for needs in several]
    shared = SharedEncodings.of(llava, pruners)
    for pruner in pruners:
        for options in ({}, {"shared": shared}):
            with pruner(llava, **options):
                llava.generate(**inputs, max_new_tokens=1)
        alone, together = (tokens.attention for tokens in pruner.seen)
        assert all(torch.equal(alone[key], together[key]) for key in pruner.wants.attention)
    assert shared.num_encoded == 2
    seen = [pruner.seen[0].attention[3, "received"] for pruner in pruners[1:]]
    assert not torch.equal(*seen)


@torch.no_grad()
def test_prompts_are_read_by_every_call(llava: Any, processor: Any) -> None:
    pruner = build_pruner("zspaprune", num_keep=6)
    first, second = (make_prompts(processor, rows) for rows in (ROWS, OTHER_ROWS))
    second["pixel_values"] = first["pixel_values"]
    shared = SharedEncodings.of(llava, [pruner])
    for inputs in (first, second, first):
        assert same_as_alone(llava, pruner, inputs, shared, processor=processor)
    assert shared.num_encoded == 1
    seen = Scripted()
    with seen(llava, shared=shared):
        llava(**first)
    assert seen.seen[0].text is None


@pytest.mark.slow
def test_prompts_tell_the_images_apart(internvl: Any) -> None:
    pruner = build_pruner("divprune", num_keep=6)
    shared = SharedEncodings.of(internvl, [pruner])
    rows = [(5, IMG, 3, IMG, 4)]
    prompts = [make_internvl(rows, tiles=tiles) for tiles in ([2, 3], [3, 2], [4, 1])]
    kept = []
    for inputs in prompts:
        inputs["pixel_values"] = prompts[0]["pixel_values"]
        assert same_as_alone(internvl, pruner, inputs, shared)
        kept.append(tuple(results(internvl, pruner, inputs)[2].flatten().tolist()))
    assert shared.num_encoded == 1
    assert len(set(kept)) == 3


# --------------------------------------------------------------------------------- what is the same


@pytest.fixture
def uniform() -> Pruner:
    return build_pruner("uniform", num_keep=6)


@torch.no_grad()
def test_other_images_are_encoded_anew(llava: Any, uniform: Pruner) -> None:
    shared = SharedEncodings.of(llava, [uniform])
    first, second = (make_batch(ONE, seed=seed) for seed in (0, 1))
    equal = first | {"pixel_values": first["pixel_values"].clone()}
    half = first | {"pixel_values": first["pixel_values"] * 2}

    def logits(inputs: Any, **options: Any) -> Tensor:
        with uniform(llava, **options):
            found: Tensor = llava(**inputs).logits
        return found

    for inputs, count in ((first, 1), (first, 1), (second, 2), (first, 3), (equal, 4), (half, 5)):
        assert torch.equal(logits(inputs, shared=shared), logits(inputs))
        assert shared.num_encoded == count
    before = logits(half)
    half["pixel_values"].mul_(0.5)
    assert torch.equal(logits(half, shared=shared), logits(half))
    assert not torch.equal(logits(half), before)
    assert shared.num_encoded == 6
    shared.clear()
    logits(half, shared=shared)
    assert shared.num_encoded == 7


@pytest.mark.slow
@torch.no_grad()
def test_only_the_last_images_are_kept(llava: Any, uniform: Pruner) -> None:
    shared = SharedEncodings.of(llava, [uniform])
    kept: list[weakref.ref[Tensor]] = []
    seen: list[list[bool]] = []

    def note(*_: Any) -> None:
        gc.collect()
        seen.append([ref() is None for ref in kept])

    hook = llava.model.vision_tower.register_forward_hook(note)
    try:
        for seed in range(2):
            inputs, pruner = make_batch(ONE, seed=seed), Scripted()
            with pruner(llava, shared=shared):
                llava(**inputs)
            kept += [weakref.ref(inputs["pixel_values"]), weakref.ref(pruner.seen[0].features)]
            del inputs, pruner
    finally:
        hook.remove()
    note()
    # What is old goes before new images take memory.
    assert seen == [[], [True, True], [True, True, False, False]]
    shared.clear()
    gc.collect()
    assert all(ref() is None for ref in kept)


@torch.no_grad()
def test_other_settings_are_encoded_anew(llava: Any, uniform: Pruner) -> None:
    shared, inputs = SharedEncodings.of(llava, [uniform]), make_batch(ONE)
    layers: list[Any] = [-2, -3, -2, [-3]]
    for number, layer in enumerate(layers):
        again = inputs | {"vision_feature_layer": layer}
        assert same_as_alone(llava, uniform, again, shared)
        assert shared.num_encoded == number + 1
    layers[3].append(-2)  # a list of the caller's that is changed
    with pytest.raises(RuntimeError), uniform(llava, shared=shared):  # two layers are too wide
        llava(**inputs, vision_feature_layer=layers[3])


@pytest.mark.slow
@torch.no_grad()
def test_another_precision_is_encoded_anew(llava: Any, uniform: Pruner) -> None:
    shared, inputs = SharedEncodings.of(llava, [uniform]), make_batch(ONE)
    kept = []
    for enabled in (False, True, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert same_as_alone(llava, uniform, inputs, shared)
        kept.append(shared.num_encoded)
    assert kept == [1, 2, 2]


@pytest.mark.slow
@torch.no_grad()
def test_changed_weights_encode_again(uniform: Pruner) -> None:
    model, inputs = tiny_llava("clip"), make_batch(ONE)
    shared = SharedEncodings.of(model, [uniform])
    logits = []
    for number in range(3):
        assert same_as_alone(model, uniform, inputs, shared)
        assert shared.num_encoded == number + 1
        logits.append(results(model, uniform, inputs)[0])
        if number == 0:
            model.model.multi_modal_projector.linear_1.weight.mul_(0.5)
        else:
            model.double()
    assert not torch.equal(logits[0], logits[1])
    assert logits[2].dtype == torch.float64


@torch.no_grad()
def test_another_tiling_is_encoded_anew(llava_next: Any) -> None:
    pruner = build_pruner("divprune", num_keep=6)
    shared, inputs = SharedEncodings.of(llava_next, [pruner]), make_next(SEVERAL)
    for number, budget in enumerate(("per_image", "per_tile", "per_image")):
        assert same_as_alone(llava_next, pruner, inputs, shared, budget=budget)
        assert shared.num_encoded == number + 1


def test_gradients_flow_into_the_tower(uniform: Pruner) -> None:
    model, inputs = tiny_llava("clip"), make_batch(ONE)
    shared = SharedEncodings.of(model, [uniform])
    weight = model.model.multi_modal_projector.linear_1.weight
    with uniform(model, shared=shared):
        ask(model, inputs)
        for number in range(2):
            model(**inputs).logits.sum().backward()
            assert weight.grad is not None
            weight.grad = None
            assert shared.num_encoded == 2 + number
        ask(model, inputs)
    assert shared.num_encoded == 3


def test_tensors_whose_changes_are_not_counted_are_encoded_anew(
    llava: Any, uniform: Pruner
) -> None:
    shared, inputs = SharedEncodings.of(llava, [uniform]), make_batch(ONE)
    expected = results(llava, uniform, inputs)
    with torch.inference_mode():
        inputs["pixel_values"] = inputs["pixel_values"].clone()
        assert torch.equal(results(llava, uniform, inputs, shared=shared)[0], expected[0])
    assert shared.num_encoded == 2


# ----------------------------------------------------------------------------- who does not share


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["vprune", "tome"])
def test_pruners_in_the_tower_pass_by(
    llava: Any, processor: Any, name: str, uniform: Pruner
) -> None:
    in_tower, inputs = build_pruner(name, num_keep=9), make_prompts(processor, ROWS)
    both = Compose([in_tower, build_pruner("divprune", num_keep=6)])
    shared = SharedEncodings.of(llava, [in_tower, both, uniform])
    for pruner, count in ((uniform, 1), (in_tower, 3), (both, 5), (uniform, 5)):
        assert same_as_alone(llava, pruner, inputs, shared, processor=processor)
        assert shared.num_encoded == count
    assert shared.unions == (Needs(),)


def test_refused_pruners_spoil_nothing(llava_siglip: Any, uniform: Pruner) -> None:
    refused, inputs = build_pruner("fastervlm", num_keep=6), make_batch(ONE)
    refused_inside = build_pruner("fastv", stages=((7, 6),))
    shared = SharedEncodings.of(llava_siglip, [refused, refused_inside, uniform])
    assert same_as_alone(llava_siglip, uniform, inputs, shared)
    before = fingerprint(llava_siglip)
    with pytest.raises(ValueError, match="reads the CLS token"):
        attach(llava_siglip, refused, shared=shared)
    assert fingerprint(llava_siglip) == before


def test_calls_that_cannot_give_what_others_read(llava: Any, uniform: Pruner) -> None:
    with_cls = Scripted(wants=Needs(cls=True))
    other = build_pruner("divprune", num_keep=6)
    inputs = make_batch(ONE) | {"vision_feature_layer": -3}
    shared = SharedEncodings.of(llava, [with_cls, uniform, other])
    assert same_as_alone(llava, other, inputs, shared)
    assert same_as_alone(llava, uniform, inputs, shared)
    assert shared.num_encoded == 1
    with (
        pytest.raises(ValueError, match="takes the tokens of another"),
        with_cls(llava, shared=shared),
    ):
        llava.generate(**inputs)
    assert same_as_alone(llava, uniform, make_batch(ONE), shared)


def test_what_a_call_cannot_give_is_tried_once(monkeypatch: pytest.MonkeyPatch, llava: Any) -> None:
    pruners = [Scripted(wants=Needs(cls=True)), Scripted(), Scripted(wants=Needs(hidden=(1,)))]
    shared, tried = SharedEncodings.of(llava, pruners), []
    inputs = make_batch(ONE) | {"vision_feature_layer": -3}
    encode = LlavaHost.encode

    def noted(host: LlavaHost, images: Any, needs: Needs) -> Any:
        tried.append(needs)
        return encode(host, images, needs)

    monkeypatch.setattr(LlavaHost, "encode", noted)
    for pruner in pruners[1:]:
        with pruner(llava, shared=shared):
            llava.generate(**inputs, max_new_tokens=1)
    assert tried == [Needs(cls=True, hidden=(1,)), Needs(), Needs(hidden=(1,))]


def test_other_pruners_and_models_are_refused(llava: Any, uniform: Pruner) -> None:
    shared = SharedEncodings.of(llava, [uniform])
    more = build_pruner("divprune", num_keep=6)
    other = deepcopy(llava)
    before = fingerprint(llava), fingerprint(other)
    with pytest.raises(ValueError, match=r"'divprune' reads more .* SharedEncodings\.of"):
        attach(llava, more, shared=shared)
    with pytest.raises(ValueError, match="was made for another model"):
        attach(other, uniform, shared=shared)
    assert (fingerprint(llava), fingerprint(other)) == before


def test_attached_models_are_copied(llava: Any, uniform: Pruner) -> None:
    inputs, shared = make_batch(ONE), SharedEncodings.of(llava, [uniform])
    with uniform(llava, shared=shared):
        expected = ask(llava, inputs)
        copied = deepcopy(llava)
        assert torch.equal(ask(copied, inputs), expected)
    assert shared.num_encoded == 1


class Parallel(nn.Module):
    """Holds a model as DDP does."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


def test_wrapped_models(llava: Any, uniform: Pruner) -> None:
    shared, inputs = SharedEncodings.of(Parallel(llava), [uniform]), make_batch(ONE)
    expected = ask(llava, inputs)
    for _ in range(2):
        with uniform(Parallel(llava), shared=shared):
            assert not torch.equal(ask(llava, inputs), expected)
    assert shared.num_encoded == 1


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models(llava: Any, uniform: Pruner) -> None:
    inputs, other = make_batch(ONE), build_pruner("divprune", num_keep=6)
    expected = [results(llava, pruner, inputs)[0] for pruner in (uniform, other)]
    compiled: Any = torch.compile(llava, backend="eager")
    shared = SharedEncodings.of(compiled, [uniform, other])
    try:
        for pruner, logits in zip((uniform, other), expected, strict=True):
            with pruner(compiled, shared=shared):
                assert torch.equal(compiled(**inputs).logits, logits)
    finally:
        torch._dynamo.reset()
    assert shared.num_encoded == 1
