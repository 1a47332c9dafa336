"""The front, the choice and its sentence, of figures that are made up."""

import numpy as np
import pytest
from made_up_options import FOUND, option

from ocvtp.recommend.choice import (
    Option,
    Span,
    choose,
    doubts,
    facts_of,
    front,
    metric_of,
    options,
    sentence,
)


def test_the_front_is_what_none_beats_in_both():
    names = [(o.label, o.num_keep) for o in front(FOUND)]
    assert names == [("fopru", 32), ("fopru", 96), ("tome", 96), ("todre", 64)]
    no_gain = [option("fopru", 96, -0.8, 57), option("fps", 96, -0.1, 101)]
    assert front(no_gain) == no_gain[:1]  # the unpruned model is faster and loses nothing
    rng = np.random.default_rng(0)
    many = [option("p", n, *rng.normal(size=2)) for n in range(50)]
    for one in many:
        beaten = any(
            o.ttft.value <= one.ttft.value and o.points.value >= one.points.value and o is not one
            for o in many
        )
        assert (one in front(many)) is not beaten


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1.0, ("fopru", 96)), (0.8, ("fopru", 96)), (0.7, ("tome", 96)), (5, ("fopru", 32))],
)
def test_the_choice_is_the_fastest_within_what_may_be_lost(most, expected):
    chosen = choose(FOUND, most)
    assert (chosen.label, chosen.num_keep) == expected
    assert chosen in front(FOUND)


def test_a_control_that_was_asked_for_may_be_the_best():
    uniform = option("uniform", 96, -0.2, 50, control=True)
    assert choose([*FOUND, uniform], 1.0) is uniform


def test_the_sentence():
    chosen = choose(FOUND, 1.0)
    assert sentence(FOUND, chosen, 1.0, "all") == (
        "fopru at K=96: -0.8 points (-1.9 to +0.3), first token after 57% of the time (56 to 58)."
    )
    text = sentence(FOUND, chosen, 1.0, "all/agreement")
    assert "-0.8 points of agreement (-1.9" in text
    own = Option("vprune", None, Span(-0.04, None, None), None, Span(57.0, None, None))
    text = sentence([own], own, 1.0, "all")
    assert text == "vprune: +0.0 points, first token after 57% of the time."


@pytest.mark.parametrize(
    ("points", "most", "told"),
    [(-1.04, 1.0, "-1.04"), (-1.0000004, 1.0, "-1.0000004"), (-0.96, 0.98, "-0.96"),
     (-1.04, 1.1, "-1.0"), (-1.0, 1.0, "-1.0"), (-0.04, 0.0, "-0.04"), (0.04, 0.0, "+0.0")],
)  # fmt: skip
def test_what_is_said_of_a_loss_is_what_the_rule_says(points, most, told):
    one = option("fopru", 96, points, 99.7)
    chosen = choose([one], most)
    assert (chosen is one) == (float(told) >= -most)
    text = sentence([one], chosen, most, "all")
    assert f"fopru at K=96: {told} points (" in text
    assert "after 99.7% of the time" in text  # which is less than all of it
    assert ("loses at most 1 point." in text) == (chosen is None and most == 1)


def test_nothing_is_recommended_that_loses_more_or_gains_no_time():
    assert choose(FOUND, 0.3) is None  # todre loses less, but is slower
    assert sentence(FOUND, None, 0.3, "all").startswith(
        "Nothing that is faster loses at most 0.3 points. The closest is tome at K=96: -0.5"
    )
    slow = [option("fopru", 96, 0.0, 101), option("tome", 96, 0.0, 105)]
    assert choose(slow, 1.0) is None
    text = sentence(slow, None, 1.0, "all")
    assert text.startswith("Nothing is faster than the unpruned model here. The fastest is fopru")
    assert doubts(slow, None, 1.0, "these 300 questions") == []


def test_what_to_doubt():
    chosen = choose(FOUND, 1.0)
    first, second = doubts(FOUND, chosen, 1.0, "these 300 questions")
    assert first == "A loss of up to 1.9 points is not excluded by these 300 questions."
    assert "chosen among 6 rows" in second
    assert not any("excluded" in text for text in doubts(FOUND, chosen, 2.0, "these"))
    (told, *_) = doubts(
        [option("fopru", 96, 0.06, 57)], option("fopru", 96, 0.06, 57), 1.0, "these"
    )
    assert told == "A loss of up to 1.04 points is not excluded by these."
    near = option("fopru", 96, -0.8, 99.5, random=Span(0.2, -0.5, 0.9))
    (_, random, time) = doubts([near], near, 1.0, "these 300 questions")
    assert "+0.2 (-0.5 to +0.9) points above them" in random
    assert "time it again" in time


def figure(value, n=10, low=None, high=None):
    span = {"value": value, "low": low, "high": high}
    return {**span, "n": n, "images": 5, "minus_unpruned": span, "minus_random": None}


def accuracy(*rows, lower=(), metrics=("easy/all",)):
    return {"lower_is_better": list(lower), "metrics": list(metrics), "rows": rows}


def timed(label, num_keep, value, changed=""):
    ratio = {"value": value, "low": value - 0.01, "high": value + 0.01}
    figures = {"ttft": {"ratio": ratio}}
    return {"label": label, "num_keep": num_keep, "changed": changed, "figures": figures}


def answered(label, num_keep, value, control=False, **given):
    figures = {"all": figure(value, **given), "easy/all": figure(value, 5)}
    return {"label": label, "num_keep": num_keep, "control": control, "figures": figures}


def test_rows_are_joined_by_pruner_and_budget():
    rows = [answered("fopru", k, -k / 1000, low=-0.1, high=0.02) for k in (8, 4)]
    rows.append({**answered("fopru", 2, 0), "figures": {}})
    cell = {"rows": [timed("fopru", 8, 0.6), timed("fopru", 8, 0.5, "all"), timed("tome", 4, 0.7)]}
    (only,) = options(accuracy(*rows), cell, "all")
    assert (only.label, only.num_keep, only.control) == ("fopru", 8, False)
    assert only.points == Span(pytest.approx(-0.8), -10, 2)
    assert only.ttft == Span(60, pytest.approx(59), pytest.approx(61))
    (only,) = options(accuracy(*rows, lower=["all"]), cell, "all")
    assert only.points == Span(pytest.approx(0.8), -2, 10)  # an error that is lower


def test_the_figure_is_that_of_all_questions():
    found = accuracy(answered("unpruned", None, 0.5))
    assert metric_of(found, None, 10) == "all"
    assert metric_of(found, None, 5) == "easy/all"
    assert metric_of(found, "easy/all", 10) == "easy/all"
    with pytest.raises(ValueError, match="all, easy/all; pass one of them, or agreement"):
        metric_of(found, "hard", 10)


def test_json_is_fastest_first():
    chosen = choose(FOUND, 1.0)
    rows = facts_of(FOUND, front(FOUND), chosen)
    assert [row["label"] for row in rows][:2] == ["fopru", "uniform"]
    assert [row["num_keep"] for row in rows if row["chosen"]] == [96]
    assert [row["label"] for row in rows if row["on_front"]] == ["fopru", "fopru", "tome", "todre"]
