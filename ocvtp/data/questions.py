"""Questions about drawn scenes, with their answers: one word each.

Existence is asked as POPE asks it: half of the answers is no, and half of those name a colour and a
shape that the scene has, but not together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np

from ocvtp.data.drawing import COLOURS, SHAPES

Kind = Literal["existence", "colour", "shape", "count"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SIZES = ("small", "large")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
MAX_COUNT = 12  # objects of a scene of the hard level
SHARES: dict[Kind, float] = {"existence": 0.35, "colour": 0.3, "shape": 0.25, "count": 0.1}
"""Of the kinds, in training."""

_ATTEMPTS = 8
_TERSE: dict[Kind, str] = {
    "existence": "is {colour} {shape}",
    "colour": "colour {size} {shape}",
    "shape": "shape {size} {colour}",
    "count": "many {plural}",
}
ENGLISH: dict[Kind, str] = {
    "existence": "Is there a {colour} {shape} in the image?",
    "colour": "What colour is the {size} {shape}?",
    "shape": "What shape is the {size} {colour} object?",
    "count": "How many {plural} are there in the image?",
}
"""What is asked, in English."""


def _words() -> tuple[str, ...]:
    templates = " ".join([*ENGLISH.values(), *_TERSE.values()])
    plain = re.findall(r"[a-z]+", re.sub(r"{\w+}", "", templates).lower())
    answers = ["yes", "no", *map(str, range(MAX_COUNT + 1)), *COLOURS, *SHAPES]
    return tuple(dict.fromkeys([*plain, *answers, *PLURALS.values(), *SIZES]))


WORDS = _words()
"""Of all questions and answers, in lower case."""


class Thing(Protocol):
    """What a question can be about, e.g. a `SceneObject`."""

    @property
    def shape(self) -> str:
        """One of `SHAPES`."""

    @property
    def colour(self) -> str:
        """One of `COLOURS`."""

    @property
    def size(self) -> str:
        """One of `SIZES`."""


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Args:
        kind: what is asked for.
        text: in English.
        terse: the same in two or three words.
        answer: one word.
        adversarial: about existence: the scene has the colour and the shape, but not together.
        objects: numbers of those that it is about, in the order of the scene's: all that it names
            or counts, none where there is no such object. Questions are the same without.
    """

    kind: Kind
    text: str
    terse: str
    answer: str
    adversarial: bool = False
    objects: tuple[int, ...] = field(default=(), compare=False)


def ask(
    objects: Sequence[Thing],
    num: int,
    rng: np.random.Generator,
    shares: Mapping[Kind, float] = SHARES,
    distinct: bool = False,
) -> list[Question]:
    """Questions about the objects of a scene.

    Where a scene has no question of a kind (no size and shape that only one object has), existence
    is asked for instead.

    Args:
        objects: at least one.
        num: how many questions.
        rng: what is random about them.
        shares: how often each kind is asked; they add up to 1.
        distinct: leave out what would be asked twice; there may then be less than `num`.

    Raises:
        ValueError: if there is no object, or if a share is unknown or they do not add up to 1.
    """
    if not objects:
        raise ValueError("a scene without objects has no questions; pass at least one object.")
    if not set(shares) <= set(KINDS) or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares={dict(shares)}: pass shares of {list(KINDS)} that add up to 1.")
    kinds = rng.choice(len(shares), size=num, p=list(shares.values()))
    names = list(shares)
    asked: list[Question] = []
    for number in kinds.tolist():
        kind, yes = names[number], bool(rng.random() < 0.5)
        for _ in range(_ATTEMPTS if distinct else 1):
            question = _ask(kind, objects, rng, yes)
            if not distinct or question not in asked:
                asked.append(question)
                break
    return asked


def _ask(kind: Kind, objects: Sequence[Thing], rng: np.random.Generator, yes: bool) -> Question:
    if kind == "count":
        return _count(objects, rng)
    if kind == "existence":
        return _existence(objects, rng, yes)
    known = ("size", "shape") if kind == "colour" else ("size", "colour")
    descriptions = [tuple(getattr(item, name) for name in known) for item in objects]
    times = Counter(descriptions)
    alone = [number for number, key in enumerate(descriptions) if times[key] == 1]
    if not alone:
        return _existence(objects, rng, yes)
    number = alone[int(rng.integers(len(alone)))]
    item = objects[number]
    words = {"size": item.size, "shape": item.shape, "colour": item.colour}
    return _question(kind, words, words[kind], about=(number,))


def _existence(objects: Sequence[Thing], rng: np.random.Generator, yes: bool) -> Question:
    present = sorted({(item.colour, item.shape) for item in objects})
    if yes:
        colour, shape = present[int(rng.integers(len(present)))]
        about = _numbers(objects, lambda item: (item.colour, item.shape) == (colour, shape))
        return _question("existence", {"colour": colour, "shape": shape}, "yes", about=about)
    crossed = _absent({c for c, _ in present}, {s for _, s in present}, present)
    others = sorted(set(_absent(set(COLOURS), set(SHAPES), present)) - set(crossed))
    if not crossed and not others:
        return _existence(objects, rng, yes=True)
    adversarial = bool(crossed) and (not others or bool(rng.random() < 0.5))
    pairs = crossed if adversarial else others
    colour, shape = pairs[int(rng.integers(len(pairs)))]
    return _question("existence", {"colour": colour, "shape": shape}, "no", adversarial)


def _absent(
    colours: set[str], shapes: set[str], present: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The pairs that the scene lacks, in a fixed order."""
    return sorted({(c, s) for c in colours for s in shapes} - set(present))


def _count(objects: Sequence[Thing], rng: np.random.Generator) -> Question:
    """Every number that the scene has is as likely as the others, so that 1 is no safe guess."""
    numbers = Counter(item.shape for item in objects)
    choices = sorted({numbers[shape] for shape in SHAPES})
    number = choices[int(rng.integers(len(choices)))]
    shapes = [shape for shape in SHAPES if numbers[shape] == number]
    shape = shapes[int(rng.integers(len(shapes)))]
    about = _numbers(objects, lambda item: item.shape == shape)
    return _question("count", {"plural": PLURALS[shape]}, str(number), about=about)


def _numbers(objects: Sequence[Thing], wanted: Callable[[Thing], bool]) -> tuple[int, ...]:
    return tuple(number for number, item in enumerate(objects) if wanted(item))


def _question(
    kind: Kind,
    words: Mapping[str, str],
    answer: str,
    adversarial: bool = False,
    about: tuple[int, ...] = (),
) -> Question:
    text, terse = ENGLISH[kind].format(**words), _TERSE[kind].format(**words)
    return Question(kind, text, terse, answer, adversarial, about)
