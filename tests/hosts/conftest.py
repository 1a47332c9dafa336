from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import (
    BATCH,
    ONE,
    best_by_cls,
    fingerprint,
    make_batch,
    num_registers,
    shorten,
    tower_states,
)
from tiny_internvl import tiny_internvl
from tiny_models import DINOS, tiny_clip, tiny_llava, tiny_processor
from tiny_qwen import FAMILIES
from tiny_qwen import ONE as ONE_OF_ANY_SIZE
from tiny_qwen import make_batch as make_qwen_batch
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


@pytest.fixture(scope="session")
def used_next(llava_next: Any, llava_next_siglip: Any) -> list[Any]:
    """Both models in tiles after a first call."""
    for model in (llava_next, llava_next_siglip):
        model.generate(**make_batch([(4,)]), max_new_tokens=1)
        model.model.vision_tower(torch.zeros(1, 3, 56, 56), output_hidden_states=True)
    return [llava_next, llava_next_siglip]


@pytest.fixture
def untouched_next(used_next: list[Any]) -> Iterator[None]:
    """Both models in tiles are the same after the test as before it."""
    before = [fingerprint(model) for model in used_next]
    yield
    for model, expected in zip(used_next, before, strict=True):
        assert dict(fingerprint(model).items() ^ expected.items()) == {}


@pytest.fixture(scope="session", params=DINOS)
def llava_dino(request: pytest.FixtureRequest) -> Any:
    """A LLaVA-1.5 with a DINO tower, after a first call."""
    model = tiny_llava(request.param)
    model.generate(**make_batch(ONE, registers=num_registers(model)), max_new_tokens=1)
    tower_states(model, torch.zeros(1, 3, 56, 56))
    return model


@pytest.fixture
def untouched_dino(llava_dino: Any) -> Iterator[None]:
    """The model is the same after the test as before it."""
    before = fingerprint(llava_dino)
    yield
    assert dict(fingerprint(llava_dino).items() ^ before.items()) == {}


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


SLOWER = [
    "qwen2.5",
    pytest.param("qwen2", marks=pytest.mark.slow),
    pytest.param("qwen3", marks=pytest.mark.slow),
]
"""One stands for the others in the fast run."""


@pytest.fixture(scope="session", params=SLOWER)
def qwen(request: pytest.FixtureRequest) -> Any:
    """A Qwen-VL after a first call, in which transformers installs hooks of its own."""
    model = FAMILIES[request.param]()
    model.generate(**make_qwen_batch(ONE_OF_ANY_SIZE), max_new_tokens=1)
    return model


@pytest.fixture
def untouched_qwen(qwen: Any) -> Iterator[None]:
    """The model is the same after the test as before it, but for what every call changes."""
    before = fingerprint(qwen)
    yield
    changed = {key for key, _ in fingerprint(qwen).items() ^ before.items()}
    assert changed <= {"model.rope_deltas."}


@pytest.fixture(scope="session")
def internvl() -> Any:
    """An InternVL after first calls, in which transformers installs hooks of its own."""
    model = tiny_internvl()
    model.generate(**make_batch([(4,)]), max_new_tokens=1)
    model.model.vision_tower(torch.zeros(1, 3, 56, 56), output_hidden_states=True)
    return model


@pytest.fixture
def untouched_internvl(internvl: Any) -> Iterator[None]:
    """The model is the same after the test as before it."""
    before = fingerprint(internvl)
    yield
    assert dict(fingerprint(internvl).items() ^ before.items()) == {}
