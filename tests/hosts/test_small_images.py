"""An image of fewer tokens than the budget stays as it is, alone as in a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matrix.families import EVERY_FAMILY, Family, untouched
from reference import IMG, assert_close

from ocvtp import Chain, Compose, attach, build_pruner
from ocvtp.hosts import find_host

ROWS = [(5, IMG, 4), (3, IMG, 2), (2, IMG, 6)]
NAMED: dict[str, dict[str, Any]] = {
    "uniform": {},
    "divprune": {},
    "fastervlm": {"block": -1},
    "visionzip": {"guidance": "received", "block": -1},
    "visiondrop": {"block": -1},
    "prumerge": {},
    "prumerge_plus": {"adaptive": True},
    "zspaprune": {},
}
INSIDE: dict[str, dict[str, Any]] = {
    "fastv": {},
    "pyramiddrop": {},
    "sparsevlm": {},
    "dart": {},
    "topv": {"relative": 0.0, "centre": 0.0},
}
HALVES: dict[str, dict[str, Any]] = {
    "visiondrop": {"later": True, "block": -1},
    "vitcop": {"guidance": "received", "block": -1},
    "vflowopt": {"cell": 1, "block": -1},
}
METHODS = [
    *NAMED,
    *(f"{name} inside" for name in INSIDE),
    "fastv on average",
    *(f"{name} halves" for name in HALVES),
    "chain",
    "compose",
]
KEPT_WHOLE = [name for name in METHODS if name != "prumerge_plus"]  # which counts by itself


@pytest.fixture(params=EVERY_FAMILY)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with untouched(request.param) as family:
        yield family


def has(family: Family, method: str) -> bool:
    """Whether a host has what a method reads: some towers have no CLS."""
    try:
        for part in build(method, 4, family).parts:
            find_host(family.model).check(part.tower_needs)
    except ValueError:
        return False
    return True


def build(method: str, num_keep: int, family: Family) -> Any:
    name, _, kind = method.partition(" ")
    layer = 2 if family.host == "qwen3_vl" else 1
    stages = ((layer, num_keep),)
    if name == "chain":
        return Chain([build_pruner(n, num_keep=num_keep) for n in ("uniform", "divprune")])
    if name == "compose":
        inside = build_pruner("fastv", stages=stages)
        return Compose([build_pruner("divprune", num_keep=num_keep), inside])
    if kind == "inside":
        return build_pruner(name, stages=stages, **INSIDE[name])
    if kind == "on average":
        return build_pruner(name, num_keep=num_keep, layer=layer)
    if kind == "halves":
        return build_pruner(name, num_keep=num_keep, stages=stages, **HALVES[name])
    return build_pruner(name, num_keep=num_keep, **NAMED[name])


def inputs_of(family: Family) -> tuple[Any, list[Any]]:
    """A batch, and its rows alone."""
    make = family.make_unresized or family.make  # some methods read what only the tower says
    inputs = make(ROWS, "left")
    return inputs, [family.single(inputs, row) for row in range(len(ROWS))]


@torch.no_grad()
def run(family: Family, pruner: Any, inputs: Any) -> tuple[Any, dict[str, Any]]:
    """Last logits, and what was kept."""
    seen: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where all images are small
        handle = attach(family.model, pruner, on_prune=seen.append)
    try:
        logits = family.model(**inputs).logits[:, -1]
        return logits, seen[-1].summary()
    finally:
        handle.remove()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
def test_images_are_kept_alone_as_in_a_batch(family: Family, method: str) -> None:
    if not has(family, method):
        pytest.skip("the tower has no CLS")
    inputs, alone = inputs_of(family)
    _, facts = run(family, build_pruner("none"), inputs)
    sizes, image = facts["visual_tokens"], family.model.config.image_token_id
    rows = (inputs["input_ids"] == image).sum(dim=1).tolist()  # with the ends of lines
    in_order = sorted(sizes)
    middle = in_order[2] if method == "fastv on average" else in_order[1]  # less cannot be had
    for num_keep in (middle - 1, max(rows) + 3):
        pruner = build(method, num_keep, family)
        logits, facts = run(family, pruner, inputs)
        for row, single in enumerate(alone):
            own, own_facts = run(family, pruner, single)
            assert own_facts["visual_tokens_kept"] == facts["visual_tokens_kept"][row : row + 1]
            assert_close(logits[row], own[0], 1e-5)
            there = sizes[row] if method in NAMED else rows[row]
            if method in KEPT_WHOLE and there < num_keep:
                with torch.no_grad():
                    bare = family.model(**single).logits[0, -1]
                assert own_facts["visual_tokens_kept"] == [sizes[row]]
                assert_close(own[0], bare, 1e-5)


def test_generate_reads_small_images_whole(family: Family) -> None:
    _, (one, *_) = inputs_of(family)
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = family.model.generate(**one, **settings)
    pruner = build_pruner("divprune", num_keep=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pruner(family.model):
            assert family.model.generate(**one, **settings).equal(expected)


def test_a_budget_beyond_all_images_is_warned_of(family: Family) -> None:
    """Where all images have as many tokens; where they differ, the next may be larger."""
    beyond = [
        build_pruner("divprune", num_keep=10_000),
        build_pruner("fastv", num_keep=10_000, layer=2),
        Compose([build_pruner("uniform", num_keep=10_000), build_pruner("fastv", layer=2)]),
    ]
    within = [
        build_pruner("divprune", num_keep=4),
        build_pruner("none", num_keep=10_000),
        build_pruner("uniform", keep_ratio=1.0),
    ]
    if has(family, "prumerge"):
        within.append(build_pruner("prumerge", num_keep=10_000, adaptive=True))
    for pruner in (*beyond, *within):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attach(family.model, pruner).remove()
        found = [str(warning.message) for warning in caught]
        if pruner in beyond and family.host == "llava":
            (message,) = found
            assert message.startswith("num_keep=10000 exceeds the 16 visual tokens that every im")
        else:
            assert found == []
