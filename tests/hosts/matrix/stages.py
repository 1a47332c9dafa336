"""Pruning before and inside the vision tower, and between the layers of the language model."""

from __future__ import annotations

from reference import assert_close
from reference_layers import Masked, last_row

from matrix.checks import GREEDY, answer, feature
from matrix.families import BATCH, Family
from ocvtp import build_pruner

TOWER = "fewer patches in the vision tower"


@feature(TOWER)
def tower(family: Family) -> None:
    """Their numbers are held to references in test_tower_stages.py."""
    inputs = (family.make_unresized or family.make)(BATCH, "left")
    bare = family.model(**inputs).logits
    real = inputs["attention_mask"].bool()
    for name in ("vprune", "tome"):
        with build_pruner(name, keep_ratio=1.0)(family.model):
            assert_close(family.model(**inputs).logits[real], bare[real], 1e-4)
        with build_pruner(name, keep_ratio=0.5)(family.model):
            together = answer(family.model, inputs)
            for row in range(len(BATCH)):
                alone = answer(family.model, family.single(inputs, row))
                assert alone.equal(together[row : row + 1])


@feature("fewer tokens in later layers of the language model")
def layers(family: Family) -> None:
    inputs, layer = family.make(BATCH, "left"), 2  # DeepStack fills the layers before
    expected = Masked(family.model, {layer: last_row(lambda size: 5)})
    with build_pruner("fastv", stages=((layer, 5),))(family.model):
        said = answer(family.model, inputs, **GREEDY | {"suppress_tokens": None})
    assert said.equal(expected.greedy(inputs, said.shape[1]))
