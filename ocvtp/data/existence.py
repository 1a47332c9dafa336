"""Whether something is in an image: what POPE asks, and what it asks for in vain.

Paper: https://arxiv.org/abs/2305.10355. C are the categories of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Negatives = Literal["random", "popular", "adversarial"]
"""What is asked for that is absent: anything, what most images have, or what most images have
together with something that is there."""
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)


def existence_question(thing: str) -> str:
    """Whether there is such a thing, with `an` before a, e, i, o and u."""
    article = "an" if thing[:1].lower() in tuple("aeiou") else "a"
    return f"Is there {article} {thing} in the image?"


def counts_together(
    categories: Sequence[str], present: Iterable[Sequence[str]]
) -> NDArray[np.int64]:
    """In how many images categories are together.

    Args:
        categories: names of all.
        present: of every image the names of what it has, each once.

    Returns:
        [C, C] images that have both; the diagonal: images that have the one.
    """
    place = {name: number for number, name in enumerate(categories)}
    rows = list(present)
    there = np.zeros((len(rows), len(place)), np.int64)
    for row, names in enumerate(rows):
        there[row, [place[name] for name in names]] = 1
    return there.T @ there


def absent_thing(
    kind: Negatives,
    positive: int,
    together: NDArray[np.int64],
    free: NDArray[np.bool_],
    random: np.random.Generator,
) -> int:
    """The number of a category to ask for in vain.

    Equally frequent ones go by their number; any is taken where none has a count above zero.

    Args:
        kind: of question.
        positive: number of a category that is there.
        together: see `counts_together`.
        free: [C] which categories may be taken; at least one.
        random: what any is drawn with.
    """
    counts = {
        "random": np.zeros_like(together[0]),
        "popular": together.diagonal(),
        "adversarial": together[positive],
    }[kind] * free
    return int(counts.argmax()) if counts.any() else int(random.choice(free.nonzero()[0]))
