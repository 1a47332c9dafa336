"""Questions about composites: their answers are what the masks say."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from tools.demo_vlm.processor import word_tokenizer
from tools.photo_vlm.composites import Pasted
from tools.photo_vlm.questions import (
    KINDS,
    LEAST_APART,
    LEAST_RATIO,
    Asker,
    plural,
    words,
)

NAMES = ("person", "bus", "dining table", "apple", "knife", "skis")
SINGULAR = {plural(name): name for name in NAMES}


def scene(seed: int, size: int = 60) -> list[Pasted]:
    """Some boxes, which may hide each other."""
    rng = np.random.default_rng(seed)
    masks: list[np.ndarray] = []
    for _ in range(int(rng.integers(1, 6))):
        mask = np.zeros((size, size), bool)
        y, x = rng.integers(size - 24, size=2)
        mask[y : y + rng.integers(6, 24), x : x + rng.integers(6, 24)] = True
        masks = [other & ~mask for other in masks] + [mask]
    found = [mask for mask in masks if mask.any()]
    return [Pasted(str(rng.choice(NAMES[:5])), mask) for mask in found]


def truth(text: str, objects: list[Pasted]) -> str:
    """The answer by the masks, from the English question."""
    areas = {item.category: item.mask.sum() for item in objects}
    middles = {
        item.category: [axis.mean() / len(item.mask) for axis in item.mask.nonzero()]
        for item in objects
    }
    times = Counter(item.category for item in objects)
    if found := re.fullmatch(r"Is there an? (.+) in the image\?", text):
        return "yes" if times[found[1]] else "no"
    if found := re.fullmatch(r"How many (.+) are there in the image\?", text):
        return str(times[SINGULAR[found[1]]])
    if found := re.fullmatch(r"Is the (.+) (larger|smaller) than the (.+)\?", text):
        one, other = areas[found[1]], areas[found[3]]
        assert times[found[1]] == times[found[3]] == 1
        assert max(one, other) >= LEAST_RATIO * min(one, other)
        return "yes" if (one > other) == (found[2] == "larger") else "no"
    found = re.fullmatch(r"Is the (.+) (to the left of|to the right of|above) the (.+)\?", text)
    assert found, text
    axis = 0 if found[2] == "above" else 1
    apart = middles[found[3]][axis] - middles[found[1]][axis]
    assert times[found[1]] == times[found[3]] == 1
    assert abs(apart) >= LEAST_APART - 1e-9
    return "yes" if (apart > 0) != found[2].endswith("right of") else "no"


@pytest.fixture(scope="module")
def asker():
    return Asker(NAMES, np.zeros((6, 6), int))


def test_answers_are_those_of_the_masks(asker):
    seen = Counter()
    for seed in range(150):
        objects = scene(seed)
        for question in asker.ask(objects, 12, np.random.default_rng(seed)):
            assert question.answer == truth(question.text, objects), question
            seen[question.kind, question.answer] += 1
    assert {kind for kind, _ in seen} == set(KINDS)
    for kind in ("existence", "comparison", "relation"):
        yes, no = seen[kind, "yes"], seen[kind, "no"]
        assert abs(yes - no) < 4 * (yes + no) ** 0.5, kind  # four deviations of a fair coin
    assert {seen["count", str(number)] > 0 for number in range(3)} == {True}


def test_questions_that_cannot_be_asked_are_of_existence(asker):
    alone = [Pasted("bus", np.ones((9, 9), bool))]
    shares = {"comparison": 0.5, "relation": 0.5}
    asked = asker.ask(alone, 20, np.random.default_rng(0), shares)
    assert {question.kind for question in asked} == {"existence"}
    twice = 2 * [*alone, Pasted("person", np.eye(9, dtype=bool))]
    asked = asker.ask(twice, 20, np.random.default_rng(0), shares)
    assert {question.kind for question in asked} == {"existence"}  # "the bus" is one of two


@pytest.mark.parametrize(("num", "often"), [(8, "bcd"), (4, "bc"), (3, "b")])
def test_half_of_what_is_asked_in_vain_is_often_seen_with_what_is_there(num, often):
    """Three categories, but never more than half of those that are not there."""
    names = tuple("abcdefgh"[:num])
    together = np.zeros((num, num), int)
    together[0, 1:] = together[1:, 0] = np.arange(num, 1, -1)
    asker = Asker(names, together)
    objects = [Pasted("a", np.ones((4, 4), bool))]
    asked = asker.ask(objects, 2000, np.random.default_rng(0), {"existence": 1.0})
    absent = [q.terse[-1] for q in asked if q.answer == "no"]
    share = sum(name in often for name in absent) / len(absent)
    assert share == pytest.approx(0.5 + 0.5 * len(often) / (num - 1), abs=0.05)


def test_none_is_asked_twice_where_that_is_asked_for(asker):
    for seed in range(20):
        asked = asker.ask(scene(seed), 8, np.random.default_rng(seed), distinct=True)
        assert len(set(asked)) == len(asked)


def test_every_word_is_known_to_the_tokenizer(asker):
    tokenizer = word_tokenizer(words(NAMES))
    for seed in range(40):
        for question in asker.ask(scene(seed), 8, np.random.default_rng(seed)):
            for text in (question.text, question.terse, question.answer):
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
            assert len(tokenizer(question.answer, add_special_tokens=False)["input_ids"]) == 1


@dataclass
class Flat:
    """An object without a mask."""

    category: str
    area: float
    centre: tuple[float, float]


def test_every_number_is_as_likely(asker):
    objects = [Flat("bus", 9, (0.5, 0.5))] * 3 + [Flat("person", 9, (0.5, 0.5))]
    asked = asker.ask(objects, 900, np.random.default_rng(0), {"count": 1.0})
    seen = Counter(question.answer for question in asked)
    assert set(seen) == {"0", "1", "3"}
    assert all(250 < number < 350 for number in seen.values())


@pytest.mark.parametrize(
    ("name", "many"),
    [
        ("person", "people"),
        ("bus", "buses"),
        ("knife", "knives"),
        ("skis", "skis"),
        ("cat", "cats"),
    ],
)
def test_plurals(name, many):
    assert plural(name) == many
