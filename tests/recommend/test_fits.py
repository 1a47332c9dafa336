"""Which pruners a model can run, from the command line."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from ocvtp import list_pruners
from ocvtp.cli import main
from ocvtp.evaluation.conditions import Budget
from ocvtp.evaluation.run import evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.hosts.loading import load_model
from ocvtp.recommend import fits


def listed(capsys, model, *more):
    assert main(["list", "--model", model, "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["pruners"]] == list_pruners()
    assert all(row["what"] for row in found["pruners"] if row["status"] != "runs")
    return {row["name"]: (row["status"], row["what"]) for row in found["pruners"]}


def test_settings_that_nobody_chose_fit_or_not_whatever_they_raise():
    for error in (ZeroDivisionError(), RuntimeError("of a shape"), ValueError("no")):
        subject = SimpleNamespace(sharing=list, attempt=Mock(side_effect=error))
        assert not fits._runs(subject, "scope:alpha=0.0", 4, None, None)


@pytest.mark.slow
def test_a_llava_runs_most_and_says_what_the_others_need(capsys):
    found = listed(capsys, "random:tiny-llava")
    assert {found[name] for name in ("fopru", "divprune", "tome", "zspaprune")} == {("runs", "")}
    status, what = found["ocvtp"]
    assert (status, "--checkpoint" in what) == ("needs", True)
    status, what = found["trim"]
    assert (status, "--text-tower" in what) == ("needs", True)
    status, what = found["fastv"]
    assert (status, "fastv:stages=[[1,K]]" in what) == ("needs", True)
    status, what = found["hiprune"]
    assert (status, "object_block: pass e.g. hiprune:object_block=2. " in what) == ("needs", True)
    status, what = found["learned_layers"]  # the network is trained for its layer
    assert status == "needs"
    assert "--checkpoint" in what
    assert "learned_layers:stages=[[2,K]]" in what
    assert listed(capsys, "random:tiny-llava", "--text-tower", "random:tiny")["trim"][0] == "runs"


@pytest.mark.slow
def test_what_runs_is_what_evaluate_runs(capsys, tmp_path):
    name = "random:tiny-qwen2.5-vl"
    found = listed(capsys, name)
    assert found["fastervlm"][0] == "cannot"  # no CLS
    assert found["trim"][0] == "cannot"
    for label, settings in {
        "visionzip": "guidance=received",
        "ridge": "weights=received",
        "vitcop": "guidance=received,stages=[[1,K]]",
        "surprise": "attention_power=0.0",
    }.items():
        status, what = found[label]
        assert (status, f"pass e.g. {label}:{settings}. Without: " in what) == ("needs", True), what
    subject = Subject(*load_model(name, "float32"), name)
    task = SceneTask(levels=("easy",), num_images=1, questions=1, size=224)
    some = ["divprune", "fopru", "fastervlm", "todre", "tome", "trim", "vprune", "zspaprune"]
    report, _ = evaluate(
        subject, task, some, [Budget(num_keep=16)], tmp_path, controls=(), skip_unfit=True
    )
    runs = {row.label for row in report.rows if row.figures} - {"unpruned", "shuffled"}
    assert runs == {label for label in some if found[label][0] == "runs"}


def test_brackets_stay_in_the_table(capsys, monkeypatch):
    fit = fits.Fit("fastv", "needs", "pass NAME:stages=[[layer,K],...]")
    monkeypatch.setattr("ocvtp.recommend.fits.fits", lambda subject: [fit])
    monkeypatch.setattr("ocvtp.hosts.loading.load_model", lambda *_: (None, None))
    assert main(["list", "--model", "random:tiny-llava"]) == 0
    assert "pass NAME:stages=[[layer,K],...]" in capsys.readouterr().out


def test_flags_of_a_model_are_refused_without_one(capsys):
    assert main(["list", "--text-tower", "random:tiny"]) == 2
    assert "--text-tower random:tiny is of a model; pass --model too" in capsys.readouterr().err
