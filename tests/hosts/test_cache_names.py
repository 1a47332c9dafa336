"""The KV cache by either of the names that versions of transformers give it, on every host."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from matrix.families import EVERY_FAMILY, FAMILIES, ONE, Family
from torch import Tensor
from transformers import DynamicCache

from ocvtp import Pruner, attach, build_pruner, transformers_names

pytestmark = pytest.mark.versions
NAMES = ("past_key_values", "cache")
PRUNERS = {
    "llm_input": lambda: build_pruner("uniform", num_keep=3),
    "llm_layers": lambda: build_pruner("fastv", stages=((2, 3),)),
}
NEW = torch.tensor([[9, 8, 7]])


@pytest.fixture(params=EVERY_FAMILY)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(params=PRUNERS.values(), ids=PRUNERS.keys())
def pruner(request: pytest.FixtureRequest) -> Pruner:
    return request.param()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def empty_cache(family: Family) -> DynamicCache:
    return DynamicCache(config=family.model.config.get_text_config())


def next_turn(inputs: Any, said: Tensor) -> Any:
    ids = torch.cat([said, NEW], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_conversations(family: Family, pruner: Pruner, name: str) -> None:
    inputs, greedy = family.make(ONE, "left"), {"max_new_tokens": 3, "do_sample": False}
    with pruner(family.model):
        output = family.model.generate(**inputs, **greedy, return_dict_in_generate=True)
        turn = next_turn(inputs, output.sequences)
        again = {key: value for key, value in inputs.items() if key not in turn}
        again.pop("mm_token_type_ids", None)
        own = {transformers_names.cache_name(): transformers_names.cache_of(output)}
        first = family.model.generate(**turn, **again, **greedy, **own)
        cache = empty_cache(family)
        said = family.model.generate(**inputs, **greedy, **{name: cache})
        assert torch.equal(said, output.sequences)
        assert torch.equal(family.model.generate(**turn, **again, **greedy, **{name: cache}), first)


@torch.no_grad()
def test_decode_steps(family: Family, pruner: Pruner, name: str) -> None:
    inputs = family.make(ONE, "left")

    def steps(**given: Any) -> Tensor:
        logits = family.model(**inputs, **given).logits[:, -1:]
        for new in (NEW[:, :1], NEW[:, 1:]):
            step = family.model(input_ids=new, **given)
            logits = torch.cat([logits, step.logits], dim=1)
        return logits

    with pruner(family.model):
        expected = steps(**{transformers_names.cache_name(): empty_cache(family)})
        assert torch.equal(steps(**{name: empty_cache(family)}), expected)


@torch.no_grad()
def test_refusals(family: Family, pruner: Pruner, name: str) -> None:
    inputs = family.make(ONE, "left")
    with pruner(family.model):
        cache = transformers_names.cache_of(family.model(**inputs))
        with pytest.raises(ValueError, match="images and a filled cache"):
            family.model(**inputs, **{name: cache})
        strange = empty_cache(family)
        strange.update(torch.zeros(1, 2, 4, 12), torch.zeros(1, 2, 4, 12), 0)
        with pytest.raises(ValueError, match="filled without the pruner"):
            family.model.generate(**inputs, **{name: strange}, max_new_tokens=1)
        both = {other: empty_cache(family) for other in NAMES}
        for call in (family.model, family.model.generate):
            with pytest.raises(ValueError, match="two names of the KV cache; pass one"):
                call(**inputs, **both)


@torch.no_grad()
def test_masks_of_the_callers_length_are_refused(family: Family, name: str) -> None:
    inputs = family.make(ONE, "left")
    with build_pruner("uniform", num_keep=3)(family.model):
        cache = transformers_names.cache_of(family.model(**inputs))
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(NEW)], dim=1)
        with pytest.raises(ValueError, match="extend the short prompt's mask"):
            family.model(input_ids=NEW, attention_mask=mask, **{name: cache})


@torch.no_grad()
def test_none_is_no_cache(family: Family, pruner: Pruner, name: str) -> None:
    inputs = family.make(ONE, "left")
    with pruner(family.model):
        expected = family.model(**inputs).logits
        assert torch.equal(family.model(**inputs, **{name: None}).logits, expected)


def test_a_newer_version_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pruner = FAMILIES[0].model, build_pruner("none")
    for installed, said in {"5.99.1": 1, "6.0.0.dev0": 1, "5.24.1": 0, "5.17.0": 0}.items():
        transformers_names.warn_if_untested.cache_clear()
        monkeypatch.setattr(transformers_names, "version", lambda _, now=installed: now)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                attach(model, pruner).remove()
        texts = [str(warning.message) for warning in caught]
        texts = [text for text in texts if f"transformers {installed} is newer" in text]
        assert len(texts) == said, installed
        assert all("tested on (5.17 to 5.24)" in text for text in texts)
    transformers_names.warn_if_untested.cache_clear()
