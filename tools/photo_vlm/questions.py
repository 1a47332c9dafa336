"""Questions about composites, with their answers: yes, no or a number.

Yes and no are equally often right. Half of the things that are asked for in vain are adversarial,
as POPE's: COCO often shows them together with something that is there. C are the categories.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from tools.photo_vlm.composites import MOST_OBJECTS

Kind = Literal["existence", "count", "comparison", "relation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SHARES: dict[Kind, float] = {
    "existence": 0.4,
    "count": 0.2,
    "comparison": 0.2,
    "relation": 0.2,
}
"""Of the kinds, in training."""
LEAST_RATIO = 1.5
"""Of two objects' visible pixels, from which on one of them is called larger."""
LEAST_APART = 0.15
"""Part of the picture that lies between the middles of what is left of, or above, each other."""

_RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above"}
_SIZES = ("larger", "smaller")
_PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep"}
_NEAREST = 3
_ATTEMPTS = 8


class Thing(Protocol):
    """What a question can be about, e.g. a `Pasted`."""

    @property
    def category(self) -> str:
        """Of COCO."""

    @property
    def area(self) -> float:
        """Visible pixels."""

    @property
    def centre(self) -> tuple[float, float]:
        """Its middle: x and y in parts of the picture."""


@dataclass(frozen=True)
class Question:
    """A question about one composite.

    Args:
        kind: what is asked for.
        text: in English.
        terse: the same in a few words.
        answer: one word.
    """

    kind: Kind
    text: str
    terse: str
    answer: str


def plural(category: str) -> str:
    """Of an English noun of COCO."""
    if category in _PLURALS:
        return _PLURALS[category]
    if category.endswith(("s", "ch", "sh", "x")):
        return category if category in ("scissors", "skis") else f"{category}es"
    return f"{category}s"


def words(categories: Sequence[str]) -> tuple[str, ...]:
    """Of all questions and answers about these, in lower case; each once."""
    texts = ["yes no", *map(str, range(MOST_OBJECTS + 1))]
    for name in categories:
        pair = (name, name)
        asked = [_existence(name, True), _count(name, 0)]
        asked += [_comparison(word, pair, True) for word in _SIZES]
        asked += [_relation(word, pair, True) for word in _RELATIONS]
        texts += [f"{q.text} {q.terse}".replace("?", " ") for q in asked]
    return tuple(dict.fromkeys(" ".join(texts).lower().split()))


class Asker:
    """Asks about composites.

    Args:
        categories: that may be asked for.
        together: [C, C] how often COCO shows two of them in one image.
    """

    def __init__(self, categories: Sequence[str], together: NDArray[np.int64]) -> None:
        self.categories, self.together = tuple(categories), together

    def ask(
        self,
        objects: Sequence[Thing],
        num: int,
        rng: np.random.Generator,
        shares: Mapping[Kind, float] = SHARES,
        distinct: bool = False,
    ) -> list[Question]:
        """Questions about the objects of a composite.

        Where there are no two that a question of a kind could be about, existence is asked for.

        Args:
            objects: at least one.
            num: how many questions.
            rng: what is random about them.
            shares: how often each kind is asked; they add up to 1.
            distinct: leave out what would be asked twice; there may then be less than `num`.
        """
        kinds = rng.choice(len(shares), size=num, p=list(shares.values()))
        names = list(shares)
        asked: list[Question] = []
        for number in kinds.tolist():
            for _ in range(_ATTEMPTS if distinct else 1):
                question = self._ask(names[number], objects, rng)
                if not distinct or question not in asked:
                    asked.append(question)
                    break
        return asked

    def _ask(self, kind: Kind, objects: Sequence[Thing], rng: np.random.Generator) -> Question:
        yes = bool(rng.random() < 0.5)
        if kind == "count":
            return self._counted(objects, rng)
        if kind == "comparison" and (sized := _sized(objects)):
            word = _SIZES[int(rng.integers(2))]
            large, small = sized[int(rng.integers(len(sized)))]
            return _comparison(word, _pair(large, small, (word == "larger") == yes), yes)
        if kind == "relation":
            word = list(_RELATIONS)[int(rng.integers(len(_RELATIONS)))]
            if apart := _apart(objects, word):
                first, second = apart[int(rng.integers(len(apart)))]
                return _relation(word, _pair(first, second, yes), yes)
        return self._exists(objects, rng, yes)

    def _exists(self, objects: Sequence[Thing], rng: np.random.Generator, yes: bool) -> Question:
        there = [name for name in self.categories if any(o.category == name for o in objects)]
        absent = [name for name in self.categories if name not in there]
        if yes or not absent:
            return _existence(there[int(rng.integers(len(there)))], True)
        if rng.random() < 0.5:
            absent = self._beside(there, absent)
        return _existence(absent[int(rng.integers(len(absent)))], False)

    def _beside(self, there: Sequence[str], absent: Sequence[str]) -> list[str]:
        """The half, or fewer, that COCO shows most often with one of those that are there."""
        place = {name: number for number, name in enumerate(self.categories)}
        rows = self.together[[place[name] for name in there]].max(0)
        num = min(_NEAREST, -(-len(absent) // 2))
        return sorted(absent, key=lambda name: -rows[place[name]])[:num]

    def _counted(self, objects: Sequence[Thing], rng: np.random.Generator) -> Question:
        """Every number that the composite has is as likely as the others, none too."""
        numbers = Counter(item.category for item in objects)
        choices = sorted({numbers[name] for name in self.categories})
        number = choices[int(rng.integers(len(choices)))]
        names = [name for name in self.categories if numbers[name] == number]
        return _count(names[int(rng.integers(len(names)))], number)


def _single(objects: Sequence[Thing]) -> list[Thing]:
    """The only ones of their category, which "the" can be said of."""
    times = Counter(item.category for item in objects)
    return [item for item in objects if times[item.category] == 1]


def _sized(objects: Sequence[Thing]) -> list[tuple[Thing, Thing]]:
    """Pairs of a larger and a smaller object."""
    single = _single(objects)
    return [(a, b) for a in single for b in single if a.area >= LEAST_RATIO * b.area]


def _apart(objects: Sequence[Thing], word: str) -> list[tuple[Thing, Thing]]:
    """Pairs whose first lies left of, right of or above the second."""
    axis, sign = (1 if word == "above" else 0), (-1 if word == "right" else 1)
    single = _single(objects)
    return [
        (a, b)
        for a in single
        for b in single
        if sign * (b.centre[axis] - a.centre[axis]) >= LEAST_APART
    ]


def _pair(first: Thing, second: Thing, in_order: bool) -> tuple[str, str]:
    names = first.category, second.category
    return names if in_order else names[::-1]


def _yes(yes: bool) -> str:
    return "yes" if yes else "no"


def _existence(name: str, yes: bool) -> Question:
    article = "an" if name[:1].lower() in tuple("aeiou") else "a"
    return Question(
        "existence", f"Is there {article} {name} in the image?", f"is {name}", _yes(yes)
    )


def _count(name: str, number: int) -> Question:
    text = f"How many {plural(name)} are there in the image?"
    return Question("count", text, f"many {name}", str(number))


def _comparison(word: str, names: tuple[str, str], yes: bool) -> Question:
    text = f"Is the {names[0]} {word} than the {names[1]}?"
    return Question("comparison", text, f"{names[0]} {word} {names[1]}", _yes(yes))


def _relation(word: str, names: tuple[str, str], yes: bool) -> Question:
    text = f"Is the {names[0]} {_RELATIONS[word]} the {names[1]}?"
    return Question("relation", text, f"{names[0]} {word} {names[1]}", _yes(yes))
