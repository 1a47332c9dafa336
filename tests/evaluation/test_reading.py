"""Results of earlier runs, of other versions, and broken ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_up_report import report, row, share, usual

from ocvtp.evaluation.report import results, write
from ocvtp.reporting.results_files import current_names, lack, read_results, read_values


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write(usual(), folder, {})
    return folder / "results.json"


@pytest.fixture
def written(once, tmp_path):
    return Path(shutil.copy(once, tmp_path))


def test_what_is_written_is_read(written):
    assert read_results(written) == results(usual()) | {"answers": {}}


def test_the_figure_of_a_pruners_name_is_read_by_its_new_one(tmp_path):
    figures = {"ridge": share(7), "cosine": share(9)}
    rows = [row("ridge", 0.5, 0, figures=figures), row("random", 0.5, 0, figures=figures)]
    old = report(*rows, metrics=["cosine", "ridge"], lower_is_better=["ridge"])
    write(old, tmp_path, {})
    found = read_results(tmp_path / "results.json")
    assert found["metrics"] == ["cosine", "unrestored"]
    assert found["lower_is_better"] == ["unrestored"]
    labels = {one["label"]: one["figures"] for one in found["rows"]}
    assert set(labels["ridge"]) == {"cosine", "unrestored"}
    assert labels["ridge"]["unrestored"]["value"] == 0.35


def test_a_record_of_an_old_log_has_the_new_name():
    assert current_names({"ridge": 0.5, "cosine": 1.0}) == {"unrestored": 0.5, "cosine": 1.0}


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("rows", 1, "figures"), None, "rows[1].figures is None"),
        (("rows", 1), {}, "rows[1].label is missing"),
        (("rows",), [], "rows is empty"),
        (("rows", 0, "figures", "easy/all"), 5, "rows[0].figures.easy/all is no object"),
        (("rows", 0, "figures", "easy/all", "value"), "5", "easy/all.value is '5'"),
        (("rows", 2, "seeds"), True, "rows[2].seeds is True"),
        (("metrics",), [], "metrics is empty"),
        (("task",), 3, "task is 3"),
    ],
)
def test_what_is_not_whole_is_refused(written, path, value, problem):
    found = json.loads(written.read_text())
    place = found
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    written.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="is not whole: .*pass a results.json") as error:
        read_results(written)
    assert problem in str(error.value)


def test_files_that_are_none_are_refused(tmp_path, written):
    with pytest.raises(ValueError, match="cannot be read"):
        read_results(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_results(tmp_path)
    for text in (written.read_text()[:-30], "[" * 100_000, "\ud800".encode("utf-8", "replace")):
        written.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=r"results\.json cannot be read"):
            read_results(written)
    written.write_text(json.dumps(results(usual()) | {"schema": 7}))
    with pytest.raises(ValueError, match="has schema 7, this version reads 1"):
        read_results(written)


def test_shapes():
    shape = {"a": [{"b": (int, float)}], "c": bool}
    assert lack({"a": [{"b": 1}, {"b": 2.5, "more": 0}], "c": False}, shape) == ""
    assert lack({"a": [{"b": 1}, {"b": np.nan}], "c": 0}, shape) == "c is 0"
    assert lack([], shape) == "it is no object"
    assert lack({"a": 5, "c": True}, shape) == "a is no list"
    assert lack({"a": [], "c": True}, shape) == ""
    assert lack({"a": []}, {"a": [str, ...]}) == "a is empty"


def test_values_alone_need_less(tmp_path):
    rows = [{"label": "fopru", "num_keep": 9, "figures": {"ridge": {"value": 0.5}}}]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"task": "coverage", "metrics": ["ridge"], "rows": rows}))
    found = read_values(path)
    assert found["metrics"] == ["unrestored"]
    assert found["rows"][0]["figures"] == {"unrestored": {"value": 0.5}}
    with pytest.raises(ValueError, match="schema is missing"):
        read_results(path)
    path.write_text(json.dumps({"task": "coverage", "metrics": ["ridge"], "rows": [{}]}))
    with pytest.raises(ValueError, match=r"rows\[0\].label is missing"):
        read_values(path)
