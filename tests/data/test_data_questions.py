"""Questions on drawn scenes, held to a reader of the English text that knows the scene alone."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from ocvtp.data.questions import KINDS, PLURALS, WORDS, ask
from ocvtp.data.scenes import COLOURS, LEVELS, SHAPES, draw_scene

SCENES = 250


@dataclass
class Thing:
    shape: str
    colour: str
    size: str


def answers(text, objects):
    """What may be answered to a question, by its words: no code of the package."""
    things = [(o.size, o.colour, o.shape) for o in objects]
    if found := re.fullmatch(r"Is there a (\w+) (\w+) in the image\?", text):
        return {"yes" if any(t[1:] == found.groups() for t in things) else "no"}
    if found := re.fullmatch(r"What colour is the (\w+) (\w+)\?", text):
        return [t[1] for t in things if (t[0], t[2]) == found.groups()]
    if found := re.fullmatch(r"What shape is the (\w+) (\w+) object\?", text):
        return [t[2] for t in things if t[:2] == found.groups()]
    found = re.fullmatch(r"How many (\w+) are there in the image\?", text)
    names = {"circles": "circle", "squares": "square", "triangles": "triangle", "stars": "star"}
    shape = names.get(found[1], "cross")
    return {str(sum(t[2] == shape for t in things))}


@cache
def scenes(level):
    """The objects of each."""
    return [draw_scene(5, index, 48, style=LEVELS[level]).objects for index in range(SCENES)]


def exam(level, num=12, **options):
    for index, objects in enumerate(scenes(level)):
        yield objects, ask(objects, num, np.random.default_rng(index), **options)


@pytest.fixture(scope="module", params=["easy", pytest.param("hard", marks=pytest.mark.slow)])
def asked(request):
    return list(exam(request.param))


@pytest.mark.slow
def test_answers_are_right_and_the_only_ones(asked):
    for objects, questions in asked:
        for question in questions:
            assert list(answers(question.text, objects)) == [question.answer], question


def test_terse_and_english_say_the_same(asked):
    for question in (q for _, questions in asked for q in questions):
        terse = question.terse.split()
        assert terse[0] == {"existence": "is", "count": "many"}.get(question.kind, question.kind)
        assert " ".join(terse[1:]) in re.sub(r"[?]", "", question.text)


def about(text, objects):
    """The objects that a question speaks of, by its words."""
    things = [(o.size, o.colour, o.shape) for o in objects]
    singular = {plural: shape for shape, plural in PLURALS.items()}
    words = {singular.get(word, word) for word in text.strip("?").split()}
    said = words & {*SHAPES, *COLOURS, "small", "large"}
    return tuple(n for n, thing in enumerate(things) if said <= set(thing))


def test_questions_name_the_objects_that_they_are_about(asked):
    for objects, questions in asked:
        for question in questions:
            assert question.objects == about(question.text, objects), question
            if question.kind in ("colour", "shape"):
                assert len(question.objects) == 1
            if question.kind == "count":
                assert str(len(question.objects)) == question.answer
            if question.kind == "existence":
                assert bool(question.objects) == (question.answer == "yes")


def test_answers_are_balanced(asked):
    questions = [q for _, qs in asked for q in qs]
    share = {kind: np.mean([q.kind == kind for q in questions]) for kind in KINDS}
    assert share["existence"] == pytest.approx(0.35, abs=0.06)
    assert share["count"] == pytest.approx(0.1, abs=0.03)
    existence = [q for q in questions if q.kind == "existence"]
    assert np.mean([q.answer == "yes" for q in existence]) == pytest.approx(0.5, abs=0.05)
    colours = Counter(q.answer for q in questions if q.kind == "colour")
    shapes = Counter(q.answer for q in questions if q.kind == "shape")
    assert set(colours) == set(COLOURS)
    assert set(shapes) == set(SHAPES)
    assert max(colours.values()) < 1.6 * min(colours.values())
    assert max(shapes.values()) < 1.6 * min(shapes.values())
    counts = Counter(q.answer for q in questions if q.kind == "count")
    assert max(counts.values()) < 0.5 * counts.total()


def test_half_of_the_noes_are_adversarial(asked):
    flags = []
    for objects, questions in asked:
        pairs = {(o.colour, o.shape) for o in objects}
        colours, shapes = {c for c, _ in pairs}, {s for _, s in pairs}
        possible = {(c, s) for c in colours for s in shapes} - pairs
        for question in questions:
            if question.kind != "existence" or question.answer == "yes":
                assert not question.adversarial
                continue
            colour, shape = question.terse.split()[1:]
            assert question.adversarial == ((colour, shape) in possible)
            if possible and len(colours) * len(shapes) < len(COLOURS) * len(SHAPES):
                flags.append(question.adversarial)
    assert np.mean(flags) == pytest.approx(0.5, abs=0.05)


def test_the_same_random_numbers_ask_the_same():
    first, again = list(exam("easy")), list(exam("easy"))
    assert [q for _, q in first] == [q for _, q in again]


def test_distinct_questions_are_asked_once():
    numbers = []
    for _, questions in exam("easy", distinct=True):
        assert len(set(questions)) == len(questions)
        numbers.append(len(questions))
    assert 9 < np.mean(numbers) < 12
    assert any(len(set(questions)) < len(questions) for _, questions in exam("easy"))


def test_only_the_kinds_that_have_a_share_are_asked():
    for _, questions in exam("easy", shares={"count": 1.0}):
        assert {q.kind for q in questions} == {"count"}


def test_without_a_describable_object_existence_is_asked():
    twins = [Thing("star", "red", "small"), Thing("star", "red", "small")]
    questions = ask(twins, 20, np.random.default_rng(0), {"colour": 0.5, "shape": 0.5})
    assert {q.kind for q in questions} == {"existence"}
    assert not any(q.adversarial for q in questions)


def test_a_scene_of_everything_is_only_asked_for_what_it_has():
    everything = [Thing(shape, colour, "small") for shape in SHAPES for colour in COLOURS]
    questions = ask(everything, 30, np.random.default_rng(0), {"existence": 1.0})
    assert {q.answer for q in questions} == {"yes"}


def test_every_word_is_in_the_vocabulary(asked):
    assert len(set(WORDS)) == len(WORDS) < 64
    assert set(PLURALS.values()) < set(WORDS)
    for question in (q for _, questions in asked for q in questions):
        words = re.findall(r"\w+", f"{question.text} {question.terse} {question.answer}".lower())
        assert set(words) <= set(WORDS)


@pytest.mark.parametrize(
    ("objects", "shares", "message"),
    [
        ([], {"count": 1.0}, "without objects"),
        ([Thing("star", "red", "small")], {"count": 0.5}, "add up to 1"),
        ([Thing("star", "red", "small")], {"where": 1.0}, "where"),
    ],
)
def test_bad_input_is_refused(objects, shares, message):
    with pytest.raises(ValueError, match=message):
        ask(objects, 3, np.random.default_rng(0), shares)
