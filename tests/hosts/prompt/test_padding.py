"""Padding on both sides of a row, and holes in it: answers behind prompts, as trainers have them.

B rows, L columns of the prompts, n of the answers, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix.families import BATCH, EVERY_FAMILY, Family
from reference import IMG, Inputs, Scripted, Side, assert_close
from tiny_models import IMAGE_TOKEN
from torch import Tensor
from torch.nn.functional import cross_entropy

from ocvtp import Pruner, Selection, VisualTokens, build_pruner

pytestmark = pytest.mark.sampled(2)

FAMILY = pytest.mark.parametrize("family", EVERY_FAMILY)
LENGTHS = [6, 2, 4]
"""Of the answers, which are padded behind."""


def by_content(tokens: VisualTokens) -> Selection:
    """Keep 3 or 5 tokens of an image, whatever stands beside it."""
    keep = 2 * torch.arange(1, 6).repeat(tokens.batch_size, 1)
    counts = 3 + 2 * (tokens.features[:, 2].float().sum(dim=1) > 0)
    return Selection(keep, torch.arange(5) < counts[:, None])


PRUNERS: dict[str, Callable[[], Pruner]] = {
    "equally many": lambda: build_pruner("divprune", num_keep=5),
    "by content": lambda: Scripted(choose=by_content, num_keep=5),
    "in later layers": lambda: build_pruner("fastv", stages=((2, 3),)),
    "merged in later layers": lambda: build_pruner("sparsevlm", stages=((2, 4),)),
}


def batch(family: Family, side: Side) -> Inputs:
    """Prompts whose images look the same in a batch and alone."""
    return (family.make_unresized or family.make)(BATCH, side)


def answered(prompts: Inputs, lengths: list[int] = LENGTHS) -> tuple[Inputs, Tensor]:
    """The prompts with answers of these lengths behind them, and where these are: [B, n]."""
    size = len(lengths), max(lengths)
    random = torch.Generator().manual_seed(5)
    answer = torch.randint(3, 99, size, generator=random)
    real = torch.arange(size[1]) < torch.tensor(lengths)[:, None]
    more = {"input_ids": answer.masked_fill(~real, 0), "attention_mask": real.long()}
    more["mm_token_type_ids"] = torch.zeros_like(answer)
    joined = {
        name: torch.cat([prompts[name], values.to(prompts[name].dtype)], dim=1)
        for name, values in more.items()
        if name in prompts
    }
    return prompts | joined, real


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, n + 1, V] and [B, n] -> [B, n]."""
    return logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, :, None])[:, :, 0]


def check_rows(family: Family, inputs: Inputs, real: Tensor, first: int = 0) -> None:
    """The last columns say of every answer what its row says alone, from its token `first` on."""
    count = real.shape[1]
    ids = inputs["input_ids"][:, -count:]
    long = family.model(**inputs).logits[:, -count - 1 :]
    kept = family.model(**inputs, logits_to_keep=count + 1).logits
    last = family.model(**inputs, logits_to_keep=count + 1, return_dict=False)[0]
    assert kept.equal(last)
    assert_close(kept[:, first:-1][real[:, first:]], long[:, first:-1][real[:, first:]])
    together = log_probs(kept, ids)
    for row, length in enumerate(real.sum(dim=1).tolist()):
        alone = family.single(inputs, row)
        says = family.model(**alone, logits_to_keep=length + 1).logits
        expected = log_probs(says, ids[row : row + 1, :length])[0, first:]
        assert_close(together[row, first:length], expected, 1e-4)


@FAMILY
@pytest.mark.parametrize("pruner", PRUNERS)
@torch.no_grad()
def test_answers_behind_padded_prompts(family: Family, pruner: str) -> None:
    inputs, real = answered(batch(family, "left"))
    with PRUNERS[pruner]()(family.model):
        check_rows(family, inputs, real)


@FAMILY
@torch.no_grad()
def test_answers_with_gaps_in_positions(family: Family) -> None:
    inputs, real = answered(batch(family, "left"))
    with PRUNERS["by content"]()(family.model, positions="original"):
        check_rows(family, inputs, real)


@FAMILY
@pytest.mark.parametrize("pruner", ["by content", "in later layers"])
@torch.no_grad()
def test_answers_behind_prompts_padded_behind(family: Family, pruner: str) -> None:
    """Padding stands between prompt and answer, so nothing tells the first token of an answer."""
    inputs, real = answered(batch(family, "right"))
    with PRUNERS[pruner]()(family.model):
        check_rows(family, inputs, real, first=1)


@FAMILY
@pytest.mark.parametrize("pruner", ["by content", "in later layers"])
@torch.no_grad()
def test_holes_are_not_read(family: Family, pruner: str) -> None:
    inputs, real = answered(batch(family, "left"))
    inputs["attention_mask"][:, -8] = 0  # in the prompt, but for shorter ones
    inputs["attention_mask"][0, -2] = 0
    real[0, -2] = False
    ids = inputs["input_ids"]
    with PRUNERS[pruner]()(family.model):
        logits = family.model(**inputs).logits[:, -real.shape[1] :]
        for row, own in enumerate(real):
            alone = family.model(**family.single(inputs, row)).logits[0, -int(own.sum()) :]
            assert_close(logits[row, own], alone, 1e-4)
    assert int((ids == IMAGE_TOKEN)[inputs["attention_mask"] == 0].sum()) == 0


@FAMILY
@torch.no_grad()
def test_equal_prompts_with_answers_padded_behind(family: Family) -> None:
    """No row has padding in front; images keep different numbers."""
    make = family.make_unresized or family.make
    sizes = make([(5, IMG, 4)] * 3, "left")["attention_mask"].sum(dim=1)
    prompts = make([(5 + int(sizes.max()) - size, IMG, 4) for size in sizes.tolist()], "left")
    assert bool(prompts["attention_mask"].all())
    inputs, real = answered(prompts)
    count = real.shape[1]
    with PRUNERS["by content"]()(family.model):
        together = family.model(**inputs, logits_to_keep=count + 1).logits
        for row, length in enumerate(LENGTHS):
            alone = family.model(**family.single(inputs, row), logits_to_keep=length + 1).logits[0]
            assert_close(together[row, : length + 1], alone, 1e-4)


@FAMILY
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_the_rows_alone(family: Family, side: Side) -> None:
    inputs, real = answered(batch(family, side))
    if side == "right":
        real[:, 0] = False  # nothing tells the first token of an answer behind padding
    labels = inputs["input_ids"].clone()
    labels[:, : -real.shape[1]] = -100
    labels[:, -real.shape[1] :][~real] = -100
    total, count = torch.zeros(()), int(real.sum())
    with torch.no_grad(), PRUNERS["by content"]()(family.model):
        loss = family.model(**inputs, labels=labels).loss
        for row, length in enumerate(real.sum(dim=1).tolist()):
            alone = family.single(inputs, row)
            logits = family.model(**alone).logits[0, -length - 1 : -1]
            total += cross_entropy(logits, alone["input_ids"][0, -length:], reduction="sum")
    assert_close(loss, total / count, 1e-5)


@FAMILY
@torch.no_grad()
def test_padding_costs_nothing_where_it_is_not_between(family: Family) -> None:
    """The short prompt is as long as its longest row, as long as padding is on one side."""
    for side in ("left", "right"):
        prompts: list[Any] = []
        with PRUNERS["by content"]()(family.model, on_prune=prompts.append):
            family.model(**batch(family, side))
        assert prompts[0].short_length == int(prompts[0].keep.sum(dim=1).max())


@FAMILY
@torch.no_grad()
def test_keeping_all_is_exact_with_any_padding(family: Family) -> None:
    inputs, _ = answered(batch(family, "left"))
    inputs["attention_mask"][:, -8] = 0
    bare = family.model(**inputs).logits
    with build_pruner("none")(family.model):
        assert family.model(**inputs).logits.equal(bare)


@FAMILY
@torch.no_grad()
def test_masks_that_cannot_be_shortened_are_refused(family: Family) -> None:
    inputs = family.make(BATCH, "left")
    mask, image = inputs["attention_mask"], inputs["input_ids"] == IMAGE_TOKEN
    hidden = mask.clone()
    hidden[2, image[2].nonzero()[3]] = 0
    whole = mask[:, None, None].bool()
    for given, message in (
        (hidden, "attention_mask is 0 on 1 of the .* image placeholders, so that parts of images"),
        (whole, "attention_mask has 4 dimensions; pass the 2-D one"),
        (
            {"full_attention": whole},
            "attention_mask is a dict, made for the caller's columns; pass",
        ),
    ):
        changed = inputs | {"attention_mask": given}
        with PRUNERS["by content"]()(family.model):
            for call in (family.model, family.model.model):
                with pytest.raises(ValueError, match=message):
                    call(**changed)
