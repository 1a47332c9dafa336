"""What every item scored, as results.json keeps it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made_up_report import report, row, usual

from ocvtp.evaluation.report import write
from ocvtp.evaluation.scores import unpacked
from ocvtp.evaluation.tasks.base import Ratio
from ocvtp.reporting.results_files import read_results


def read(given, folder):
    write(given, folder, {})
    return read_results(folder / "results.json")


def same(one, other):
    return all(np.array_equal(getattr(one, k), getattr(other, k)) for k in ("hits", "of", "owners"))


def test_scores_are_read_as_they_were_written(tmp_path):
    given = usual(of=40)
    again = unpacked(read(given, tmp_path))
    for was, found in zip(given.rows, again, strict=True):
        assert was.figures.keys() == found.keys()
        assert all(same(was.figures[name], found[name]) for name in found)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("seeds", "hits", "of", "coded"),
    [
        (1, [1, 0, 1], [1, 1, 1], {"hits": "101"}),
        (3, [1 / 3, 0, 1], [1, 1, 1], {"hits": "103"}),
        (2, [0.5, 0, 1], [0.5, 0, 1], {"hits": "102", "of": "102"}),
        (1, [0.25, 0, 1], [1, 1, 1], {"hits": [0.25, 0, 1]}),
        (10, [0.1, 0, 1], [1, 1, 1], {"hits": [0.1, 0, 1]}),
    ],
)
def test_means_over_seeds_are_digits_where_they_can_be(tmp_path, seeds, hits, of, coded):
    ratio = Ratio(np.array(hits, float), np.array(of, float), np.array([0, 0, 1]))
    other = Ratio(np.ones(2), np.ones(2), np.array([4, 5]))
    rows = [row("a", 0.5, 0, seeds=seeds, figures={"easy/all": ratio})]
    rows += [row("b", 0.5, 0, figures={"easy/all": other})]
    found = read(report(*rows), tmp_path)
    assert found["scores"]["rows"][0]["easy/all"] == coded
    first, second = unpacked(found)
    assert same(first["easy/all"], ratio)
    assert same(second["easy/all"], other)


def test_a_file_of_an_older_version_has_none(tmp_path):
    found = read(usual(of=40), tmp_path)
    del found["scores"]
    assert unpacked(found) is None


@pytest.mark.sampled(1)
@pytest.mark.parametrize("damage", ["short", "row", "digits", "kind"])
def test_broken_scores_are_refused(tmp_path, damage):
    found = json.loads(json.dumps(read(usual(of=40), tmp_path)))
    rows = found["scores"]["rows"]
    if damage == "short":
        rows[0]["easy/all"]["hits"] = rows[0]["easy/all"]["hits"][:-1]
    elif damage == "row":
        rows.pop()
    elif damage == "digits":
        rows[0]["easy/all"]["hits"] = "x" * 40
    else:
        found["scores"]["owners"] = []
    with pytest.raises(ValueError, match=r"here\.json is not whole: its scores"):
        unpacked(found, "here.json")
