"""`ocvtp table`: what is in it, in which order, and what is bold."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from latex_parser import check, rows
from made_up_report import report, row

from ocvtp.cli import main
from ocvtp.evaluation.intervals import difference
from ocvtp.evaluation.report import results
from ocvtp.evaluation.tasks.base import Ratio
from ocvtp.reporting.paper_table import Column, Entry, Row, escaped, with_bold

BENCH = Path(__file__).parents[2] / "docs/results/bench-llava-mid-cpu/results.json"
N = 400


def answers(wrong, seed):
    """All right but `wrong` of N items."""
    hits = np.ones(N)
    hits[np.random.default_rng(seed).permutation(N)[:wrong]] = 0
    return Ratio(hits, np.ones(N), np.arange(N) % 200)


def made(best=40, **given):
    """`close` errs where `good` does and on 4 items more; `apart` on 30 others, and on as many."""
    good = answers(best, 0)
    close, far = good.hits.copy(), good.hits.copy()
    close[np.flatnonzero(close)[:4]] = 0
    far[np.flatnonzero(far)[-14:]] = 0
    shares = {"good": good.hits, "close": close, "far_off:a=1,b=2": far, "mine": 1 - good.hits}
    found = [row("unpruned", 1.0, 390, N), row("shuffled", 1.0, 100, N)]
    for budget in (0.5, 0.25):
        for label, hits in shares.items():
            ratio = Ratio(hits, np.ones(N), np.arange(N) % 200)
            own = {"yours": True} if label == "mine" else {}
            found.append(row(label, budget, 0, figures={"easy/all": ratio}, **own))
        found.append(row("random", budget, 399, N))
    return report(*found, **given)


def write(given, place):
    (place / "results.json").write_text(json.dumps(results(given)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluated")
    write(made(), place)
    return place


def table(capsys, *words):
    status = main(["table", *map(str, words)])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    parsed = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {line[0].strip("*"): line[1:] for line in parsed}


def test_methods_stand_between_the_unpruned_model_and_controls(capsys, folder):
    found = cells(table(capsys, folder))
    assert list(found) == [
        "pruner", "--------------------", "`unpruned`", "`good`", "`close`", "`far_off:a=1,b=2`",
        "`mine` (yours)", "`random` (control)", "`shuffled` (control)",
    ]  # fmt: skip
    assert found["pruner"] == ["tokens", "18", "9"]
    assert found["`unpruned`"] == ["all", "97.5", "97.5"]
    assert found["`good`"] == ["18 / 9", "**90.0**", "**90.0**"]  # random is better, a control
    assert found["`random` (control)"] == ["18 / 9", "99.8", "99.8"]


def bold(text):
    return [label for label, line in cells(text).items() if "**" in "".join(line)]


def test_bold_by_paired_differences(capsys, folder, tmp_path):
    """4 items of 400 apart: intervals overlap, but all that differs is for the better."""
    given = {r.label: r.figures["easy/all"] for r in made().rows if r.budget == 0.25}
    assert difference(given["good"], given["close"]).low > 0
    assert bold(table(capsys, folder, "--bold", "ci")) == ["`good`"]
    assert "paired difference" in table(capsys, folder, "--bold", "ci")
    found = json.loads((folder / "results.json").read_text())
    del found["scores"]
    (tmp_path / "old.json").write_text(json.dumps(found))
    text = table(capsys, tmp_path / "old.json", "--bold", "ci")
    assert bold(text) == ["`good`", "`close`", "`far_off:a=1,b=2`"]
    assert "overlaps" in text
    assert bold(table(capsys, folder, "--bold", "none")) == []


@pytest.mark.parametrize(
    ("values", "lower", "expected"),
    [((0.0, 0.0, 0.0), False, ""), ((0.0, 0.0004, 0.3), False, ""), ((0.0, 0.1, 0.0), False, "b"),
     ((0.0, 0.0, 0.0), True, ""), ((0.0, 0.1, 0.3), True, "a")],
)  # fmt: skip
def test_0_is_bold_only_where_it_is_the_lowest(values, lower, expected):
    entries = dict(zip(("a", "b", "random"), map(Entry, values), strict=True))
    kinds = {name: Row("control" if name == "random" else "method") for name in entries}
    column = Column("easy/all", "50%", entries, kinds, places=1, scale=100, lower=lower)
    for rule in ("best", "ci"):
        found = with_bold(column, rule, lambda a, b: a == b)
        assert "".join(name for name, one in found.entries.items() if one.bold) == expected


def test_errors_are_bold_where_they_are_lowest(capsys, tmp_path):
    write(made(lower_is_better=["easy/all"]), tmp_path)
    text = table(capsys, tmp_path, "--bold", "best")
    assert bold(text) == ["`mine` (yours)"]
    assert "easy/all, % (lower is better)" in text
    assert list(cells(text))[3] == "`mine` (yours)"


def test_latex_can_be_parsed(capsys, folder):
    text = table(capsys, folder, "--format", "latex", "--with-interval")
    found = rows(text)
    assert [line[-1] for line in found[:2]] == [r"\multicolumn{2}{c}{easy/all, \%}", "9"]
    named = {line[0]: line for line in found}
    assert r"\texttt{far\_off:a=1,b=2}" in named
    assert named[r"\textbf{\texttt{mine}}$^{\dagger}$"][1] == "18 / 9"
    assert named[r"\texttt{good}"][2].startswith(r"\textbf{90.0} {\scriptsize (8")
    assert text.count(r"\midrule") == 3
    assert "400 questions on 200 images" in text
    assert "2000 resamples of the images" in text
    assert r"$\dagger$: ours." in text
    assert r"\label{tab:scenes}" in text
    both = rows(table(capsys, folder, BENCH, "--format", "latex", "--metric", "easy/all", "ttft"))
    assert len(both[0]) == 4


@pytest.mark.parametrize("text", ["a_b & 50% #1 {x}", "~/^\\ $5", 'a<b>|c" …'])
def test_plain_text_is_no_latex(text):
    check(escaped(text))
    assert escaped("50% a_b") == r"50\% a\_b"


@pytest.mark.parametrize("text", ["a_b", "50# ", "{", "\\unknown", "\\begin{a}\\end{b}", "5~"])
def test_the_parser_refuses_what_latex_would(text):
    with pytest.raises(AssertionError):
        check(text)


def test_csv_has_all_digits(capsys, folder):
    text = table(capsys, folder, "--format", "csv", "--with-interval", "--only", "close")
    lines = list(csv.DictReader(io.StringIO(text)))
    stored = json.loads((folder / "results.json").read_text())["rows"]
    (figure,) = [
        r["figures"]["easy/all"] for r in stored if (r["label"], r["budget"]) == ("close", 0.25)
    ]
    assert [line["pruner"] for line in lines] == ["unpruned", "close"]
    line = {name.removeprefix("easy/all, %: "): value for name, value in lines[1].items()}
    assert [float(line[k]) for k in ("9", "9, low", "9, high")] == [
        figure["value"], figure["low"], figure["high"]
    ]  # fmt: skip
    assert line["kind"] == "method"


def test_what_is_chosen_is_shown(capsys, folder):
    words = ["--only", "good,far_off:a=1,b=2", "--num-keep", "9", "--digits", "3"]
    found = cells(table(capsys, folder, *words))
    assert list(found)[2:] == ["`unpruned`", "`good`", "`far_off:a=1,b=2`"]
    assert found["pruner"] == ["tokens", "9"]
    assert found["`good`"][1] == "**90.000**"
    assert cells(table(capsys, folder, "--keep-ratio", "0.5"))["pruner"] == ["tokens", "18"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "goood"], "none of that name; did you mean 'good'? They have unpruned, "),
        (["--metric", "ttft"], "--metric ttft: the results have none"),
        (["--num-keep", "7"], "nothing is left of"),
        (["--digits", "-1"], "--digits -1; pass 0 to 10."),
    ],
)  # fmt: skip
def test_what_there_is_not_is_refused(capsys, folder, words, told):
    assert main(["table", str(folder), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert told in err


def test_files_stand_side_by_side(capsys, folder, tmp_path):
    write(made(60, model="other/demo-2"), tmp_path)
    text = table(capsys, folder, tmp_path, "--num-keep", "9", "--output", tmp_path / "t" / "a.md")
    assert text == f"wrote {tmp_path / 't' / 'a.md'}\n"
    found = cells((tmp_path / "t" / "a.md").read_text())
    assert found["pruner"][1:] == ["demo: easy/all, %: 9", "demo-2: easy/all, %: 9"]
    assert found["`good`"] == ["9", "**90.0**", "**85.0**"]


def timed(tmp_path, twin):
    """Two pruners at two budgets; `ocvtp` takes as long as `fopru` in every round, or longer."""
    found = json.loads(BENCH.read_text())
    (cell,) = found["cells"]
    rows_ = [r for r in cell["rows"] if not r["changed"]]
    if twin:
        same = copy.deepcopy(rows_[1])
        rows_[2] |= {"samples": same["samples"], "figures": same["figures"]}
    cell["rows"] = [*rows_, {**copy.deepcopy(rows_[1]), "label": "mine", "yours": True}]
    cell["rows"][-1]["num_keep"] = 32
    path = tmp_path / f"{twin}.json"
    path.write_text(json.dumps(found))
    return path


def test_times_have_tables_too(capsys, tmp_path):
    text = table(
        capsys, timed(tmp_path, False), "--metric", "ttft", "ttft/unpruned", "--bold", "ci"
    )
    found = cells(text)
    group = ["TTFT, ms (lower is better)", "TTFT / unpruned (lower is better)"]
    assert found["pruner"][1:] == [f"{one}: {count}" for one in group for count in (64, 32)]
    assert found["`unpruned`"] == ["all", "6318", "6318", "-", "-"]
    assert found["`fopru`"][1] == "**4116**"
    assert found["`mine` (yours)"][2:4:2] == ["**4116**"]
    assert "medians of 9 rounds" in text
    twins = table(capsys, timed(tmp_path, True), "--bold", "ci", "--num-keep", "64")
    assert bold(twins) == ["`fopru`", "`ocvtp`"]


def test_times_have_true_averages_beside_them(capsys, tmp_path):
    """Of pruners between layers, where the file says them."""
    path = timed(tmp_path, False)
    found = json.loads(path.read_text())
    kept = found["cells"][0]["rows"][1]["kept"]
    kept |= {"layers": [{"layer": 2, "visual_tokens_kept": [9]}], "visual_tokens_average": [44.25]}
    path.write_text(json.dumps(found))
    assert cells(table(capsys, path, "--num-keep", "64"))["`fopru`"][0] == "44.2"
    del kept["visual_tokens_average"]
    path.write_text(json.dumps(found))
    assert cells(table(capsys, path, "--num-keep", "64"))["`fopru`"][0] == ""


def test_json_holds_the_table(capsys, folder):
    facts = json.loads(table(capsys, folder, "--json"))
    assert facts["format"] == "markdown"
    assert "`good`" in facts["table"]


@pytest.mark.parametrize("place", ["task", "model", "counts", "metric", "label"])
def test_markdown_shows_what_results_of_others_say_and_makes_nothing_of_it(tmp_path, capsys, place):
    text = "<img src=x> [a](http://b) ```<b>`"
    found = results(made())
    if place == "metric":
        found["metrics"] = [text]
        for one in found["rows"]:
            one["figures"] = {text: next(iter(one["figures"].values()))}
    elif place == "label":
        found["rows"][2]["label"] = text
    else:
        found[place] = text
    (tmp_path / "results.json").write_text(json.dumps(found))
    shown = table(capsys, tmp_path / "results.json").replace(
        "`<img src=x> [a](http://b) '''<b>'`", ""
    )
    assert "<" not in shown
    assert "](" not in shown


def test_a_metric_that_no_row_has_is_told(tmp_path, capsys):
    found = results(made())
    found["metrics"] = ["nothing"]
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert main(["table", str(tmp_path / "results.json")]) == 2
    assert "no row has a figure 'nothing'" in capsys.readouterr().err
