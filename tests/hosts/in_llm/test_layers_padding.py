"""What is dropped inside the language model does not depend on padding, in a plain forward() too.

Without `position_ids` a model numbers the columns of a batch, padding on the left included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matrix.families import EVERY_FAMILY, Family, untouched
from reference import IMG, assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from ocvtp import build_pruner
from ocvtp.hosts.in_llm.attention import turn, turn_to_start
from ocvtp.pruners.layer_pruner import LayerNeeds
from ocvtp.structures import LayerTokens

pytestmark = pytest.mark.sampled(2)

ROWS = [(3, IMG, 4), (90, IMG, 7), (40, IMG, 2)]
NO_GRID = {"relative": 0.0, "centre": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "fastv": {},
    "pyramiddrop": {},
    "sparsevlm": {},
    "sparsevlm plus": {"plus": True},
    "dart": {},
    "topv": NO_GRID,
    "visiondrop": {"num_keep": 12, "later": True, "block": -1},
    "vitcop": {"num_keep": 12, "guidance": "received", "block": -1, "cluster_share": 0.3},
    "vflowopt": {"num_keep": 12, "cell": 1, "block": -1},
}


@pytest.fixture(params=EVERY_FAMILY)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with untouched(request.param) as family:
        yield family


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", METHODS)
def test_rows_padded_on_the_left_are_as_alone(family: Family, method: str) -> None:
    layer = 2 if family.host == "qwen3_vl" else 1
    pruner = build_pruner(method.split()[0], stages=((layer, 8),), **METHODS[method])
    assert all(part.batch_invariant for part in pruner.parts)
    make = family.make_unresized or family.make  # some read what only the tower says
    inputs, kept = make(ROWS, "left"), []
    with pruner(family.model, on_prune=lambda prompt: kept.append(prompt.layers)), torch.no_grad():
        together = family.model(**inputs).logits[:, -1]
        for row in range(len(ROWS)):
            alone = family.model(**family.single(inputs, row)).logits[0, -1]
            assert_close(together[row], alone, 1e-5)
    (of_batch, *of_rows) = [[stayed.places for stayed in plan.kept] for plan in kept]
    assert sorted(p.tolist() for places in of_batch for p in places) == sorted(
        p.tolist() for places in of_rows for p in places[0]
    )


def test_keys_are_those_of_the_row_alone(family: Family) -> None:
    layer, seen = 2 if family.host == "qwen3_vl" else 1, []
    inputs = family.make(ROWS, "left")
    for read in (layer - 1, layer):
        seen.clear()
        pruner = _reads_keys(read, layer, seen)
        with pruner(family.model), torch.no_grad():
            family.model(**inputs)
            together, others = list(seen), []
            for row in range(len(ROWS)):
                seen.clear()
                family.model(**family.single(inputs, row))
                others += seen
        rows = [
            tokens.map(lambda t, i=i: t[i])
            for tokens in together
            for i in range(len(tokens.features))
        ]
        assert len(rows) == len(others) == len(ROWS)
        for one in others:
            best = min(
                (row for row in rows if row.keys[read].shape == one.keys[read].shape[1:]),
                key=lambda row: (row.features - one.features[0]).abs().max(),  # noqa: B023
            )
            assert_close(best.keys[read], one.keys[read][0], 1e-5)
            words = best.text_keys[read][best.text_valid]
            assert_close(words, one.text_keys[read][0], 1e-5)


def _reads_keys(read: int, layer: int, seen: list[LayerTokens]) -> Any:
    base = type(build_pruner("fastv"))

    class ReadsKeys(base):  # type: ignore[misc, valid-type]
        def needs_at(self, layer: int) -> LayerNeeds:
            return LayerNeeds(keys=(read,), text=True, attention=((layer - 1, "last"),))

        def _select_at(self, tokens: Any, layer: int, num_keep: int) -> Any:
            seen.append(tokens)
            return super()._select_at(tokens, layer, num_keep)

    return ReadsKeys(stages=((layer, 6),))


def test_keys_of_scaled_positions_keep_their_scale() -> None:
    """YaRN makes cosines and sines longer than 1."""
    rope = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, rope_parameters=rope, max_position_embeddings=512)
    attention, rotary = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)
    states = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))

    def turned(start: int) -> Any:
        cos, sin = rotary(states, start + torch.arange(6)[None])
        return turn(attention, states, "k_norm", cos, sin), cos, sin

    at_start, cos, sin = turned(0)
    assert (cos.square() + sin.square()).min() > 1.1
    assert turn_to_start(attention, at_start, cos[:, :1], sin[:, :1]).equal(at_start)
    keys, cos, sin = turned(77)
    assert_close(turn_to_start(attention, keys, cos[:, :1], sin[:, :1]), at_start, 1e-5)
