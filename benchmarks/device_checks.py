"""What must hold on a device, checked on small models: the same functions on a CPU and on CUDA.

Tests run them on both, and `benchmarks.gpu` before it measures, on a machine that may lack pytest.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

import ocvtp
from benchmarks.official_forms import FORMS
from benchmarks.select import build, make_tokens
from ocvtp.bench.workload import Cell, make_request
from ocvtp.hosts.base import Savings
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.select import compiled
from ocvtp.hosts.registry import find_host
from ocvtp.structures import VisualTokens

GRID = (12, 12)
NUM_KEEP = 16


def _demo(device: str, dtype: str = "float32") -> tuple[Any, Any]:
    """The demo VLM with random weights, and one prompt."""
    model, processor = load_model("random:demo", dtype, device)
    request = make_request(Cell(1, 48), processor, (96, 96))
    return model, request.prepare(processor, model)


def _tokens(device: str, batch: int = 2, double: bool = False) -> VisualTokens:
    def moved(values: Tensor) -> Tensor:
        values = values.double() if double and values.is_floating_point() else values
        return values.to(device)

    return make_tokens(batch, GRID, 256).map(moved)


def keeping_all_is_exact(device: str) -> None:
    """A model under `none` answers as the bare model, to the last bit."""
    model, inputs = _demo(device)
    bare = model(**inputs).logits
    with ocvtp.build_pruner("none")(model):
        assert model(**inputs).logits.equal(bare)


def pruned_logits_are_those_of_a_short_prompt(device: str) -> None:
    """A prompt without the dropped tokens, made from what the bare language model reads."""
    model, inputs = _demo(device)
    read: list[Tensor] = []
    prompts: list[Any] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        read.append(kwargs["inputs_embeds"])

    hook = find_host(model).language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        hook.remove()
    with ocvtp.build_pruner("fopru", num_keep=NUM_KEEP)(model, on_prune=prompts.append):
        pruned = model(**inputs, logits_to_keep=1).logits
    short = read[0][prompts[0].keep.to(device)][None]
    assert short.shape[1] == read[0].shape[1] - GRID[0] * GRID[1] + NUM_KEEP
    assert_close(model(inputs_embeds=short, logits_to_keep=1).logits, pruned, rtol=1e-4, atol=1e-4)


def projecting_the_kept_alone_only_rounds(device: str) -> None:
    """`project_kept` projects fewer rows, whose last bits may differ."""
    model, inputs = _demo(device, "bfloat16")
    found = []
    for kept_alone in (True, False):
        prompts: list[Any] = []
        savings = Savings(project_kept=kept_alone)
        pruner = ocvtp.build_pruner("fopru", num_keep=NUM_KEEP)
        with pruner(model, savings=savings, on_prune=prompts.append):
            model(**inputs)
        found.append(prompts[0])
    assert found[0].selection.keep_indices.equal(found[1].selection.keep_indices)
    rounding = 4 * torch.finfo(torch.bfloat16).eps
    assert_close(found[0].embeddings, found[1].embeddings, rtol=rounding, atol=rounding)


def a_graph_of_select_keeps_the_same(device: str) -> None:
    """A short method, and a greedy loop: on CUDA as a CUDA graph, launched twice."""
    backend = "inductor" if device == "cuda" else "eager"
    for name in ("fopru", "divprune"):
        pruner = build(name, 8, _tokens(device))
        run = compiled(pruner, backend)
        for tokens in (_tokens(device, double=True), _tokens(device, 3, double=True)):
            wanted = pruner.select(tokens).keep_indices
            for _ in range(2):
                assert run(pruner, tokens).keep_indices.equal(wanted), name


@contextmanager
def no_sync(device: str) -> Iterator[None]:
    """Whatever waits for the device raises."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@torch.no_grad()
def select_waits_for_nothing(device: str) -> None:
    """Of every pruner before the language model."""
    tokens, waits = _tokens(device), {}
    for name in ocvtp.list_pruners("llm_input"):
        try:
            pruner = build(name, NUM_KEEP, tokens)
        except ValueError:  # a network, or what it is trained from, must be given
            continue
        if isinstance(network := vars(pruner).get("network"), torch.nn.Module):
            network.to(device)
        try:
            pruner.select(tokens)  # what is made once, at the first call
            with no_sync(device):
                pruner.select(tokens)
        except RuntimeError as error:
            waits[name] = str(error).splitlines()[0]
    assert not waits, waits


@torch.no_grad()
def choosing_in_an_attached_model_waits_for_nothing(device: str) -> None:
    """What surrounds the choice may wait: `waits` says where."""
    model, inputs = _demo(device)
    pruner, caught = ocvtp.build_pruner("divprune", num_keep=NUM_KEEP), []
    plain = pruner.select

    def select(tokens: VisualTokens) -> Any:
        with no_sync(device):
            caught.append(plain(tokens))
        return caught[-1]

    pruner.select = select  # type: ignore[method-assign]
    with pruner(model):
        model(**inputs)
    assert caught


@torch.no_grad()
def a_device_keeps_what_a_cpu_keeps(device: str) -> None:
    """Greedy methods in double precision; official forms on the CPU are the reference."""
    here = _tokens("cpu", double=True)
    there = _tokens(device, double=True)
    for name, form in FORMS.items():
        kept = build(name, NUM_KEEP, there).select(there).keep_indices.cpu()
        assert kept.equal(form(here, NUM_KEEP).sort(dim=1).values), name


@torch.no_grad()
def waits(device: str, name: str, num_keep: int, model: Any, inputs: Any) -> dict[str, int]:
    """How often the lines of a pruned call's prompt wait for a device; none do on a CPU."""
    pruner = ocvtp.build_pruner(name, num_keep=num_keep)
    with warnings.catch_warnings(record=True) as caught, pruner(model):
        warnings.simplefilter("always")
        model(**inputs, logits_to_keep=1)
        caught.clear()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**inputs, logits_to_keep=1)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    lines = (
        f"{one.filename}:{one.lineno}"
        for one in caught
        if "synchronizing CUDA op" in str(one.message)
    )
    return dict(Counter(lines))


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (
        keeping_all_is_exact,
        pruned_logits_are_those_of_a_short_prompt,
        projecting_the_kept_alone_only_rounds,
        select_waits_for_nothing,
        choosing_in_an_attached_model_waits_for_nothing,
        a_device_keeps_what_a_cpu_keeps,
        a_graph_of_select_keeps_the_same,
    )
}
"""In the order in which they are run: the compiler takes longest."""
