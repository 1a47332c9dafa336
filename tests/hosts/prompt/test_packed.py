"""Several samples packed in one row: none of them sees the others, pruned or not.

B rows, L columns.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from matrix.families import EVERY_FAMILY, FAMILIES, Family
from reference import IMG, Inputs, Scripted, assert_close
from test_padding import by_content
from torch import Tensor

from ocvtp import Needs, Pruner, Selection, VisualTokens, build_pruner

FAMILY = pytest.mark.parametrize("family", EVERY_FAMILY)
PLAIN = pytest.mark.parametrize("family", FAMILIES[:4], ids=lambda family: family.host)
"""Tokens of the others have coordinates."""
ROWS = [(5, IMG, 4), (9,), (IMG, 2, IMG, 6)]
pytestmark = [pytest.mark.filterwarnings("ignore:the processor"), pytest.mark.sampled(2)]


def most_like_the_words(tokens: VisualTokens) -> Selection:
    """The 4 tokens that are most like the mean of the prompt's words."""
    assert tokens.text is not None
    assert tokens.projected is not None
    words = tokens.text.sum(dim=1) / tokens.text_valid.sum(dim=1, keepdim=True)
    scores = torch.einsum("ind,id->in", tokens.projected, words)
    if tokens.valid is not None:
        scores = scores.masked_fill(~tokens.valid, -torch.inf)
    return Selection(scores.topk(4).indices.sort().values)


PRUNERS: dict[str, Callable[[], Pruner]] = {
    "equally many": lambda: build_pruner("divprune", num_keep=5),
    "by content": lambda: Scripted(choose=by_content, num_keep=5),
    "reads text": lambda: Scripted(
        choose=most_like_the_words, wants=Needs(text=True, projected=True)
    ),
}


def samples(family: Family) -> tuple[Inputs, list[Inputs]]:
    """A batch, and its rows alone."""
    inputs = (family.make_unresized or family.make)(ROWS, "left")
    return inputs, [family.single(inputs, row) for row in range(len(ROWS))]


def pack(family: Family, inputs: Inputs, alone: list[Inputs]) -> Inputs:
    """All rows of a batch behind each other, told apart by their positions."""
    real = inputs["attention_mask"].bool()
    per_token = ("input_ids", "mm_token_type_ids")
    packed = {k: v for k, v in inputs.items() if k != "attention_mask"}
    packed |= {name: inputs[name][real][None] for name in per_token if name in inputs}
    numbers = torch.cat([torch.arange(one["input_ids"].shape[1]) for one in alone])[None]
    if "image_grid_thw" in inputs:
        places = [places_of(family.model, one) for one in alone]
        numbers = torch.cat([numbers[None], torch.cat(places, dim=2)])
    return packed | {"position_ids": numbers, "use_cache": False}


def places_of(model: Any, one: Inputs) -> Tensor:
    """[3, 1, L]."""
    places, _ = model.model.get_rope_index(
        one["input_ids"],
        mm_token_type_ids=one["mm_token_type_ids"],
        image_grid_thw=one.get("image_grid_thw"),
    )
    return places


@FAMILY
@torch.no_grad()
def test_keeping_all_is_exact(family: Family) -> None:
    inputs, alone = samples(family)
    packed = pack(family, inputs, alone)
    bare = family.model(**packed).logits
    assert_close(bare, torch.cat([family.model(**one).logits for one in alone], dim=1), 1e-4)
    for positions in ("contiguous", "original") if "image_grid_thw" in inputs else ("contiguous",):
        with build_pruner("none")(family.model, positions=positions):
            assert family.model(**packed).logits.equal(bare)


@FAMILY
@pytest.mark.parametrize("pruner", PRUNERS)
@torch.no_grad()
def test_a_packed_sample_is_that_sample_alone(family: Family, pruner: str) -> None:
    inputs, alone = samples(family)
    with PRUNERS[pruner]()(family.model):
        together = family.model(**pack(family, inputs, alone)).logits
        expected = torch.cat([family.model(**one).logits for one in alone], dim=1)
    assert_close(together, expected, 1e-4)


@PLAIN
@torch.no_grad()
def test_a_row_of_one_sample_is_that_sample(family: Family) -> None:
    inputs, alone = samples(family)
    numbers = torch.arange(alone[0]["input_ids"].shape[1])[None]
    one = {k: v for k, v in alone[0].items() if k != "attention_mask"}
    for positions in ("contiguous", "original"):
        with PRUNERS["by content"]()(family.model, positions=positions):
            actual = family.model(**one, position_ids=numbers, use_cache=False).logits
            assert_close(actual, family.model(**alone[0]).logits, 1e-5)


@FAMILY
@torch.no_grad()
def test_packed_rows_of_a_batch(family: Family) -> None:
    """Rows that lose fewer tokens are longer: what fills up the others is a sample of its own."""
    inputs, alone = samples(family)
    first = pack(family, inputs, alone)
    length = first["input_ids"].shape[1]
    text = torch.arange(3, 3 + length)[None]
    numbers = torch.arange(length)[None]
    if "image_grid_thw" in inputs:
        numbers = numbers.expand(4, 1, -1)
    both = first | {
        "input_ids": torch.cat([first["input_ids"], text % 90 + 3]),
        "position_ids": torch.cat([first["position_ids"], numbers], dim=-2),
    }
    if "mm_token_type_ids" in both:
        both["mm_token_type_ids"] = torch.cat([both["mm_token_type_ids"], torch.zeros_like(text)])
    bare = family.model(**both).logits
    with build_pruner("none")(family.model):
        assert family.model(**both).logits.equal(bare)
    with PRUNERS["by content"]()(family.model):
        expected = family.model(**first).logits[0]
        logits = family.model(**both).logits
    assert_close(logits[0, : len(expected)], expected, 1e-4)
    assert_close(logits[1], bare[1], 1e-4)


@FAMILY
def test_labels_of_packed_samples(family: Family) -> None:
    inputs, alone = samples(family)
    packed, starts = pack(family, inputs, alone), []
    labels = packed["input_ids"].masked_fill(
        packed["input_ids"] == family.model.config.image_token_id, -100
    )
    for one in alone:
        starts.append(sum(starts[-1:]) + one["input_ids"].shape[1])
    labels[:, [0, *starts[:-1]]] = -100
    total, count = torch.zeros(()), 0
    with torch.no_grad(), PRUNERS["by content"]()(family.model):
        loss = family.model(**packed, labels=labels).loss
        for one, own in zip(alone, labels.tensor_split(starts[:-1], dim=1), strict=True):
            number = int((own[:, 1:] != -100).sum())
            total += family.model(**one, labels=own).loss * number
            count += number
    assert_close(loss, total / count, 1e-5)


@PLAIN
@torch.no_grad()
def test_ends_for_flash_attention_are_shortened(family: Family) -> None:
    """DataCollatorWithFlattening hands them over; other attention passes them by."""
    inputs, alone = samples(family)
    packed, seen = pack(family, inputs, alone), []
    sizes = torch.tensor([one["input_ids"].shape[1] for one in alone])
    ends = torch.cat([torch.zeros(1), sizes.cumsum(dim=0)]).int()
    longest = int(sizes.max())
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone()}
    given |= {"max_length_q": longest, "max_length_k": torch.tensor(longest)}
    keep: list[Any] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append({name: kwargs.get(name) for name in given})

    hook = family.model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with PRUNERS["reads text"]()(family.model, on_prune=keep.append):
            with_positions = family.model(**packed, **given).logits
            without = {k: v for k, v in packed.items() if k != "position_ids"}
            family.model(**without, **given)
            expected = torch.cat([family.model(**one).logits for one in alone], dim=1)
            ids = torch.cat([packed["input_ids"], torch.full_like(packed["input_ids"], 5)])
            with pytest.raises(ValueError, match="pass one row"):
                family.model(**without | {"input_ids": ids}, **given)
    finally:
        hook.remove()
    assert_close(with_positions, expected, 1e-4)
    kept = [int(part.sum()) for part in keep[0].keep[0].split(sizes.tolist())]
    assert keep[1].keep.equal(keep[0].keep)
    for found in seen[:2]:
        assert found["cu_seq_lens_q"].diff().tolist() == kept
        assert found["cu_seq_lens_k"].equal(found["cu_seq_lens_q"])
        assert found["cu_seq_lens_q"].dtype == torch.int32
        assert found["max_length_q"] == int(found["max_length_k"]) == max(kept)


@FAMILY
@torch.no_grad()
def test_what_would_let_samples_see_each_other_is_refused(family: Family) -> None:
    inputs, alone = samples(family)
    packed = pack(family, inputs, alone)
    with build_pruner("fastv", stages=((2, 3),))(family.model):
        with pytest.raises(ValueError, match="fastv drops tokens inside the language model, where"):
            family.model(**packed | {"use_cache": True})
    if family in FAMILIES[:4]:
        with PRUNERS["by content"]()(family.model, positions="original"):
            with pytest.raises(ValueError, match="pass one prompt a row"):
                family.model(**packed)
    shifted = deepcopy(packed)
    sizes = [one["input_ids"].shape[1] for one in alone]
    kept: list[Any] = []
    with PRUNERS["by content"]()(family.model, on_prune=kept.append):
        family.model(**packed)
        first = int(kept[0].keep[0, : sizes[0]].sum())
        shifted["position_ids"][..., sizes[0] : sizes[0] + sizes[1]] += first
        with pytest.raises(ValueError, match="let the positions of every sample begin with 0"):
            family.model(**shifted)


@FAMILY
@torch.no_grad()
def test_with_a_mask_positions_are_just_positions(family: Family) -> None:
    inputs, alone = samples(family)
    packed = pack(family, inputs, alone)
    packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    bare = family.model(**packed).logits
    with build_pruner("none")(family.model):
        assert_close(family.model(**packed).logits, bare, 1e-6)
    if "image_grid_thw" in inputs:  # no plane that would tell samples apart
        del packed["attention_mask"]
        for planes in (packed["position_ids"][1:], packed["position_ids"][0]):
            bare = family.model(**packed | {"position_ids": planes}).logits
            with build_pruner("none")(family.model):
                assert_close(family.model(**packed | {"position_ids": planes}).logits, bare, 1e-6)
