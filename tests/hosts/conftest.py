from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from reference import BATCH, ONE, best_by_cls, fingerprint, make_batch, shorten
from tiny_models import tiny_clip, tiny_processor
from torch import Tensor

from ocvtp import Pruner, build_pruner


@pytest.fixture(scope="session")
def used(llava: Any, llava_siglip: Any) -> list[Any]:
    """Both models after a first call, in which transformers installs hooks of its own."""
    for model in (llava, llava_siglip):
        model.generate(**make_batch(ONE), max_new_tokens=1)
    return [llava, llava_siglip]


@pytest.fixture
def untouched(used: list[Any]) -> Iterator[None]:
    """Both models are the same after the test as before it."""
    before = [fingerprint(model) for model in used]
    yield
    for model, expected in zip(used, before, strict=True):
        assert dict(fingerprint(model).items() ^ expected.items()) == {}


@pytest.fixture
def pruner() -> Pruner:
    return build_pruner("fastervlm", num_keep=5)


@pytest.fixture
def inputs() -> Any:
    return make_batch(BATCH)


@pytest.fixture
def answer(llava: Any, inputs: Any) -> Tensor:
    """What the pruned model answers, made by hand."""
    short = shorten(llava, inputs, best_by_cls(llava, inputs["pixel_values"], 5))
    return short.greedy(5)


@pytest.fixture(scope="session")
def processor() -> Any:
    """What makes the inputs of `llava`: a token for every character."""
    return tiny_processor()


@pytest.fixture(scope="session")
def clip(llava: Any) -> tuple[Any, Any]:
    """The CLIP that the tower of `llava` is from, and its tokenizer."""
    return tiny_clip(llava.model.vision_tower)
