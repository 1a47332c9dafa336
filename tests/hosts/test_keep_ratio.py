"""A share of the tokens is one of each image's own, also where images of a batch differ in size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import IMG
from reference_next import make_next, single_next
from tiny_qwen import make_batch as make_qwen_batch
from tiny_qwen import single, tiny_qwen
from torch import Tensor

from ocvtp import Chain, Compose, VisualTokens, build_pruner
from ocvtp.hosts.prompt.select import select_shares

pytestmark = pytest.mark.sampled(2)

RATIO = 0.3
METHODS: dict[str, Any] = {
    "fastervlm": {},
    "divprune": {},
    "visionzip": {},
    "prumerge": {"adaptive": False},
    "ridge": {},
}
QWEN = {
    "divprune": {},
    "visionzip": {"guidance": "received", "block": -1},
}


@torch.no_grad()
def prune(model: Any, pruner: Any, inputs: Any, **options: Any) -> tuple[Tensor, Any]:
    seen: list[Any] = []
    with pruner(model, on_prune=seen.append, **options):
        logits = model(**inputs).logits
    return logits, seen[0]


def check_rows(model: Any, make: Any, rows: Any, alone: Any, **options: Any) -> list[int]:
    """Every row of a batch as it is alone; returns the tokens kept of each image."""
    logits, prompt = prune(model, make(), rows, **options)
    counts = prompt.selection.counts().tolist()
    assert len(set(counts)) > 1, "images differ"
    first = 0
    for row, inputs in enumerate(alone):
        expected, single_prompt = prune(model, make(), inputs, **options)
        own = single_prompt.selection.counts().tolist()
        assert counts[first : first + len(own)] == own
        first += len(own)
        real = prompt.short_mask[row]
        assert torch.allclose(logits[row, real], expected[0], atol=2e-5, rtol=1e-4)
    assert first == len(counts)
    return counts


@pytest.mark.parametrize("name", QWEN)
def test_qwen(name: str) -> None:
    model = tiny_qwen()
    inputs = make_qwen_batch(ROWS_OF_QWEN)
    alone = [single(inputs, row) for row in range(len(ROWS_OF_QWEN))]

    def make() -> Any:
        return build_pruner(name, keep_ratio=RATIO, **QWEN[name])

    counts = check_rows(model, make, inputs, alone)
    sizes = [height * width for _, (height, width), _ in ROWS_OF_QWEN]
    assert counts == [round(RATIO * size) for size in sizes]


ROWS_OF_QWEN = [(5, (8, 12), 4), (3, (4, 4), 2), (2, (12, 8), 6)]


@pytest.mark.parametrize("budget", ["per_image", "per_tile"])
@pytest.mark.parametrize("name", METHODS)
def test_llava_next(llava_next: Any, name: str, budget: Any) -> None:
    rows = [(5, IMG, 4), (3, IMG, 2), (2, IMG, 6)]
    inputs = make_next(rows)
    alone = [single_next(inputs, row) for row in range(len(rows))]

    def make() -> Any:
        return build_pruner(name, keep_ratio=RATIO, **METHODS[name])

    check_rows(llava_next, make, inputs, alone, budget=budget)


def test_chains_and_compositions(llava_next: Any) -> None:
    inputs = make_next([(5, IMG, 4), (3, IMG, 2), (2, IMG, 6)])
    plain = build_pruner("none")
    sizes = prune(llava_next, plain, inputs)[1].encoded.counts()
    steps = [build_pruner("fastervlm", keep_ratio=0.5), build_pruner("divprune", keep_ratio=0.5)]
    _, prompt = prune(llava_next, Chain(steps), inputs)
    halves = [round(0.5 * size) for size in sizes.tolist()]
    assert prompt.selection.counts().tolist() == [round(0.5 * half) for half in halves]
    later = build_pruner("fastv", stages=((1, 3),))
    _, prompt = prune(llava_next, Compose([steps[0], later]), inputs)
    assert prompt.selection.counts().tolist() == halves


def test_first_halves_of_methods() -> None:
    random = torch.Generator().manual_seed(0)
    sizes = [6, 12, 6, 9]
    valid = torch.arange(12) < torch.tensor(sizes)[:, None]
    scores, keys = torch.rand(4, 12, generator=random), torch.randn(4, 12, 8, generator=random)
    for name, kind, settings in (
        ("visiondrop", "received", {"later": True}),
        ("vflowopt", "global", {}),
        ("vitcop", "cls", {}),
    ):
        first = build_pruner(name, keep_ratio=0.5, **settings).parts[0]

        def tokens(rows: slice, count: int, valid: Any, kind: Any = kind) -> VisualTokens:
            return VisualTokens(
                features=keys[rows, :count],
                grid_hw=(1, count),
                valid=valid,
                attention={(-2, kind): scores[rows, :count]},
                keys={-2: keys[rows, :count]},
                num_heads=1,
            )

        together = select_shares(first, tokens(slice(None), 12, valid))
        for image, size in enumerate(sizes):
            alone = first.select(tokens(slice(image, image + 1), size, None))
            kept = together.valid[image]
            assert together.keep_indices[image, kept].equal(alone.keep_indices[0]), name


def test_numbers_of_tokens_are_what_they_were(llava_next: Any) -> None:
    inputs = make_next([(5, IMG, 4), (3, IMG, 2), (2, IMG, 6)])
    _, prompt = prune(llava_next, build_pruner("fastervlm", num_keep=7), inputs)
    assert prompt.selection.counts().tolist() == [7, 7, 7]


def test_what_a_share_comes_to() -> None:
    pruner = build_pruner("fastervlm", keep_ratio=0.001)
    assert pruner.keeps_share
    assert pruner.of_size(100).num_keep == 1
    assert pruner.keep_ratio == 0.001
    fixed = build_pruner("fastervlm", num_keep=5)
    assert not fixed.keeps_share
    assert fixed.of_size(100) is fixed
