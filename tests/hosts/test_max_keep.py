"""A cap: images of at most so many tokens are read whole, as without a pruner; others are cut."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matrix.families import EVERY_FAMILY, Family, untouched
from reference import GREEDY, IMG, assert_close

from ocvtp import attach, build_pruner

ROWS = [(5, IMG, 4), (3, IMG, 2), (2, IMG, 6)]
METHODS: dict[str, dict[str, Any]] = {
    "divprune": {},
    "visionzip": {"guidance": "received", "block": -1},
    "prumerge_plus": {},
    "visiondrop": {"later": True, "block": -1, "stages": ((2, 1.0),)},
    "fastv": {"layer": 2},
}


@pytest.fixture(params=EVERY_FAMILY)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with untouched(request.param) as family:
        yield family


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_images_within_a_cap_are_as_unpruned(family: Family, name: str) -> None:
    if name == "prumerge_plus" and family.host not in ("llava", "llava_next"):
        pytest.skip("its towers here have no CLS")
    model = family.model
    inputs = (family.make_unresized or family.make)(ROWS, "left")
    alone = [family.single(inputs, row) for row in range(len(ROWS))]
    bare = [model(**one).logits[0, -1] for one in alone]
    sizes = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    if name != "fastv":  # which reads the ends of lines as others do tokens
        seen = list[Any]()
        with build_pruner("none")(model, on_prune=seen.append):
            model(**inputs)
        sizes = seen[-1].encoded.counts().tolist()
    prompts, most = list[Any](), max(sizes)
    for max_keep in (most - 1 if name == "fastv" else sorted(sizes)[1], most):
        pruner = build_pruner(name, max_keep=max_keep, **METHODS[name])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attach(model, pruner).remove()
        assert caught == []  # a cap may be larger than any image
        with pruner(model, on_prune=prompts.append):
            logits = model(**inputs).logits[:, -1]
            facts = prompts[-1].summary()
            for row, size in enumerate(sizes):
                own = model(**alone[row]).logits[0, -1]
                assert_close(logits[row], own, 1e-5)
                if size <= max_keep:
                    assert_close(own, bare[row], 1e-5)
                else:
                    assert not torch.allclose(own, bare[row], atol=1e-6)
        if name != "fastv":
            assert facts["visual_tokens_kept"] == [min(size, max_keep) for size in sizes]
    if name == "divprune":
        expected = model.generate(**inputs, **GREEDY)
        with build_pruner(name, num_keep=3)(model):
            assert model.generate(**inputs, **GREEDY, max_keep=most).equal(expected)
