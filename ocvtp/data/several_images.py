"""Questions about one of several images: is there such a thing in the second one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ocvtp.data.drawing import COLOURS, SHAPES
from ocvtp.data.existence import existence_question
from ocvtp.data.questions import Thing

Where = Literal["there", "elsewhere", "nowhere"]
"""Whether what is asked for is in the image, in another one alone, or in none."""
WHERE: tuple[Where, ...] = get_args(Where)
ORDINALS = ("first", "second", "third", "fourth")
_SHARES = (0.5, 0.3, 0.2)


@dataclass(frozen=True)
class OfSeveral:
    """A question about one of several images.

    Args:
        text: in English. answer: `yes` or `no`.
        where: what is asked for. image: number of the image that is asked about.
    """

    text: str
    answer: str
    where: Where
    image: int


def ask_of_several(
    images: Sequence[Sequence[Thing]], num: int, rng: np.random.Generator
) -> list[OfSeveral]:
    """Whether there is a red circle in the second image, and so on; none is asked twice.

    Half of the answers is yes; of the others most name what another image has. There may be less
    than `num`.

    Args:
        images: the objects of each, at least one object in all. num: how many questions.
        rng: what is random about them.

    Raises:
        ValueError: for one image, or more than there are words for.
    """
    if not 2 <= len(images) <= len(ORDINALS):
        raise ValueError(f"{len(images)} images; pass 2 to {len(ORDINALS)}.")
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    has = [{(item.colour, item.shape) for item in objects} for objects in images]
    asked: list[OfSeveral] = []
    for where in rng.choice(len(WHERE), size=num, p=_SHARES).tolist():
        image = int(rng.integers(len(images)))
        others = set().union(*(pairs for n, pairs in enumerate(has) if n != image))
        choices = {
            "there": has[image],
            "elsewhere": others - has[image],
            "nowhere": set(every) - others - has[image],
        }[WHERE[where]]
        some = [pair for pair in every if pair in choices]
        if some:
            colour, shape = some[int(rng.integers(len(some)))]
            text = existence_question(f"{colour} {shape}").replace(
                "the image", f"the {ORDINALS[image]} image"
            )
            answer = "yes" if WHERE[where] == "there" else "no"
            question = OfSeveral(text, answer, WHERE[where], image)
            if question not in asked:
                asked.append(question)
    return asked
