"""A selector knows the model that it was trained in, and says so where it is in another."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_networks import selector

import ocvtp
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.origin import content_hash, origin_of
from ocvtp.hosts.registry import find_host


@pytest.fixture(scope="module")
def model():
    return load_model("random:tiny-llava")[0]


def trained_in(host, name="learned", **other):
    """A pruner that was trained in a host, or in one that differs in these facts."""
    origin = origin_of(host, "my-model")
    widths, facts = origin["widths"], origin["host"] | other
    stage = {"learned": "llm_input", "learned_layers": "llm_layers"}[name]
    layer = {"layer": 1} if name == "learned_layers" else {}
    network = selector(stage, widths.tower, "pointwise", widths.projected, host=facts, **layer)
    budget = {"stages": ((1, 4),)} if layer else {"num_keep": 4}
    return ocvtp.build_pruner(name, network=network, **budget)


@pytest.mark.parametrize("name", ["learned", "learned_layers"])
def test_its_own_model_is_no_news(model, name):
    pruner = trained_in(find_host(model), name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pruner(model):
            pass


@pytest.mark.parametrize("name", ["learned", "learned_layers"])
def test_other_weights_are_named_once_at_attaching(model, name):
    host = find_host(model)
    pruner = trained_in(host, name, content_hash="0123456789abcdef")
    own = content_hash(host)[:12]
    told = rf"{name}' was trained in my-model, .* hash 0123456789ab, .* this model have {own};"
    with pytest.warns(UserWarning, match=told) as found, pruner(model):
        pass
    assert len(found) == 1


@pytest.mark.parametrize("name", ["learned", "learned_layers"])
@pytest.mark.parametrize("fact", [{"width": 33}, {"num_layers": 7}])
def test_another_width_or_other_layers_are_refused(model, name, fact):
    pruner = trained_in(find_host(model), name, **fact)
    with pytest.raises(ValueError, match=r"trained in .* (33 wide|7 layers).*; pass a checkpoint"):
        ocvtp.attach(model, pruner)


def test_what_nothing_is_known_of_is_taken(model):
    pruner = trained_in(find_host(model), content_hash=None, width=None, num_layers=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pruner(model):
            pass


def test_the_hash_is_of_numbers_and_not_of_their_type():
    made = load_model("random:tiny-llava", "bfloat16")[0]
    first = content_hash(find_host(made))
    assert first == content_hash(find_host(made.float()))
    layer = find_host(made).language_model.layers[-1]
    with torch.no_grad():
        layer.self_attn.q_proj.weight.mul_(1.01)
    assert content_hash(find_host(made)) != first
    assert content_hash(find_host(made.to("meta"))) is None
