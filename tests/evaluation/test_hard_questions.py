"""Figures on the questions that a smaller image fails."""

import json

import numpy as np
import pytest
from made_up_report import report, row, share

from ocvtp.evaluation.report import results, to_markdown
from ocvtp.evaluation.tasks.base import Ratio


def answered(*right):
    return Ratio(np.array(right, float), np.ones(len(right)), np.arange(len(right)) // 2)


RIGHT = {
    "unpruned": answered(1, 1, 1, 1, 1, 0, 1, 0),
    "downsample": answered(1, 1, 0, 0, 1, 0, 0, 0.3),
    "pool": answered(0, 1, 1, 1, 1, 0, 1, 1),
    "random": answered(1, 0, 1, 0, 1, 0, 0, 0),
    "fopru": answered(0, 0, 1, 1, 1, 0, 1, 0),
}


def made_up(*labels, **given):
    rows = [
        row(label, 1.0 if label == "unpruned" else 0.25, None, figures={"easy/all": RIGHT[label]})
        for label in labels
    ]
    return report(*rows, **given)


def test_the_questions_are_those_that_the_smaller_image_fails():
    (part,) = results(made_up(*RIGHT))["where_downsampling_fails"]
    assert (part["metric"], part["budget"], part["by"]) == ("easy/all", 0.25, "downsample")
    assert (part["n"], part["images"]) == (5, 3)  # 0.3 of an answer fails too
    rows = {one["label"]: one for one in part["rows"]}
    values = {label: one["value"] for label, one in rows.items()}
    assert values == pytest.approx(
        {"unpruned": 0.6, "downsample": 0.06, "pool": 0.8, "random": 0.2, "fopru": 0.6}
    )
    assert rows["fopru"]["minus_random"]["value"] == pytest.approx(0.4)
    assert rows["fopru"]["minus_unpruned"]["value"] == pytest.approx(0.0)
    assert rows["fopru"]["low"] < 0.6 < rows["fopru"]["high"]


def test_pooling_judges_where_images_cannot_be_smaller():
    (part,) = results(made_up("unpruned", "pool", "fopru"))["where_downsampling_fails"]
    assert (part["by"], part["n"]) == ("pool", 2)
    text = to_markdown(made_up("unpruned", "pool", "fopru"))
    assert "on the questions that `pool` fails" in text
    assert "As few as 2 questions" in text


def test_there_is_none_without_a_smaller_image_or_without_answers():
    for given in (made_up("unpruned", "fopru"), made_up(*RIGHT, asks=False)):
        assert results(given)["where_downsampling_fails"] == []
        assert "questions that" not in to_markdown(given).split("## How to read")[0]


def test_what_does_not_count_each_question_is_left_out():
    some = share(8)
    precision = Ratio(some.hits, some.hits, some.owners)
    rows = [row(label, 0.25, None, figures={"easy/all": precision}) for label in ("pool", "fopru")]
    assert results(report(*rows))["where_downsampling_fails"] == []


def test_nothing_failed_is_no_figure_and_json():
    rows = [row(label, 0.25, 20) for label in ("pool", "fopru")]
    found = results(report(*rows))
    (part,) = found["where_downsampling_fails"]
    assert part["n"] == 0
    assert part["rows"][1]["value"] is None
    json.dumps(found, allow_nan=False)
    assert "0 at 25%" in to_markdown(report(*rows))
