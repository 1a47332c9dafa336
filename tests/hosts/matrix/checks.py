"""The table of features, and what their checks share.

Each is held to what was made without our code: the bare model says it, or the model's own parts do
on a prompt pruned by hand (`by_hand`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reference import Inputs, Scripted, answer_of
from tiny_models import IMAGE_TOKEN
from torch import Tensor

from matrix.families import BATCH, SEVERAL, Family, some

Check = Callable[[Family], None]
FEATURES: dict[str, Check] = {}
"""Title -> check, which raises if a family lacks the feature."""
SLOW: set[str] = set()
"""Titles of those that take more than a second."""
NUM_NEW = 4
SETTINGS = {"max_new_tokens": NUM_NEW, "suppress_tokens": [IMAGE_TOKEN]}
GREEDY = SETTINGS | {"do_sample": False}
DICTIONARY = {"return_dict_in_generate": True, "output_scores": True}


def feature(title: str, slow: bool = False) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        FEATURES[title] = torch.no_grad()(check)
        if slow:
            SLOW.add(title)
        return check

    return add


def pruner() -> Scripted:
    return Scripted(choose=some)


def answer(model: Any, inputs: Inputs, **settings: Any) -> Tensor:
    """What follows the caller's prompt, which must stand in front of it."""
    return answer_of(model, inputs, **(settings or GREEDY))


def by_hand(family: Family, inputs: Inputs, model: Any = None, side: Any = "left") -> Any:
    """The prompt that `pruner()` leaves."""
    return family.shorten(family.model if model is None else model, inputs, side)


def check_greedy(family: Family, model: Any, rows: Any = BATCH, **settings: Any) -> None:
    """A way of decoding says what a loop written by hand does."""
    inputs = family.make(rows, "left")
    expected = by_hand(family, inputs).greedy(NUM_NEW)
    with pruner()(model):
        assert answer(model, inputs, **GREEDY | settings).equal(expected)


def check_like_the_host(family: Family, **settings: Any) -> None:
    """A way of decoding says what the host's own generate() does with the short prompt."""
    for rows in (SEVERAL, BATCH):
        inputs = family.make(rows, "left")
        short = by_hand(family, inputs)
        torch.manual_seed(3)
        expected = short.generate(**SETTINGS | settings)
        torch.manual_seed(3)
        with pruner()(family.model):
            assert answer(family.model, inputs, **SETTINGS | settings).equal(expected)
