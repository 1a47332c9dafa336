"""`ocvtp flops`: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ocvtp.cli import main
from ocvtp.random_models.full_size import DEMO

PRUNER = DEMO.parent / "demo-pruner" / "0"


def test_published_figures_are_what_the_command_shows(capsys):
    assert main(["flops", "--model", "llava-1.5-7b", "--num-keep", "576", "192", "128", "64"]) == 0
    cells = _cells(capsys.readouterr().out)
    assert [row[:5] for row in cells] == [
        ["unpruned", "576", "6.31", "3.82", "8.07"],
        ["any", "192", "2.28", "1.25", "2.93"],
        ["any", "128", "1.62", "0.83", "2.09"],
        ["any", "64", "0.97", "0.42", "1.25"],
    ]
    words = ["flops", "--model", "random:llava-next-7b", "--num-keep", "2880", "640", "320", "160"]
    assert main(words) == 0
    cells = _cells(capsys.readouterr().out)
    assert [row[:5] for row in cells] == [
        ["unpruned", "2880", "33.76", "20.83", "42.16"],
        ["any", "640", "7.00", "4.25", "8.94"],
        ["any", "320", "3.61", "2.10", "4.62"],
        ["any", "160", "1.95", "1.04", "2.51"],
    ]


@pytest.mark.slow
def test_json_report_and_plot_of_pruners(tmp_path, capsys):
    specs = ["ocvtp", "ocvtp:early=true,choice=one_to_one", "fastv:stages=[[1,40]]", "vprune"]
    words = ["flops", "--model", str(DEMO), "--num-keep", "64", "32", "--checkpoint", str(PRUNER)]
    assert main([*words, "--output", str(tmp_path), "--json", "--pruners", *specs]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads((tmp_path / "results.json").read_text())
    rows = {(row["label"], row["num_keep"]): row for row in facts["rows"]}
    shared = [spec for spec in specs if "stages" not in spec]
    budgets = [(spec, k) for k in (64, 32) for spec in shared]
    assert list(rows) == [("unpruned", 144), *budgets, ("fastv:stages=[[1,40]]", None)]
    for row in rows.values():
        parts = [row[key] for key in ("tower", "projector", "select", "language_model")]
        assert row["total"] == sum(parts)
        assert row["language_model"] == sum(row["layers"]) + row["lm_head"]
        assert row["language_model"] == row["conventions"]["true"]
    assert rows[specs[1], 32]["tower"] < rows["ocvtp", 32]["tower"]
    assert rows["vprune", 32]["select"] == 0 < rows["ocvtp", 32]["select"]
    assert rows["fastv:stages=[[1,40]]", None]["visual"] == [144, 40, 40]
    report = (tmp_path / "report.md").read_text()
    assert "layers 0 to 0: 144 visual tokens" in report
    assert len(_cells(report)) == 8
    with Image.open(tmp_path / "flops.png") as image:
        assert image.width > 600


def test_k_of_stages_is_no_average(capsys):
    words = ["flops", "--model", "llava-1.5-7b", "--num-keep", "64", "--pruners"]
    assert main([*words, "fastv:stages=[[2,K]]", "--json"]) == 0
    _, row = json.loads(capsys.readouterr().out)["rows"]
    assert (row["num_keep"], row["visual"][2]) == (64, 64)
    assert sum(row["visual"]) / len(row["visual"]) == 96
    assert main([*words, "fastv:stages=[[2,K]]", "sparsevlm:setting=paper-64"]) == 0
    out = capsys.readouterr().out
    assert [row[-1] for row in _cells(out)] == ["576", "96", "82.25"]  # true averages
    legend = " ".join(out.split())
    assert "an average over its layers. Where `stages` or a published `setting` say" in legend


@pytest.mark.slow
def test_a_spec_that_has_a_budget_needs_no_other(capsys):
    words = ["flops", "--model", "llava-1.5-7b", "--pruners"]
    specs = ["fopru:max_keep=64", "sparsevlm:setting=paper-64", "divprune:keep_ratio=0.5"]
    assert main([*words, *specs]) == 0
    cells = _cells(capsys.readouterr().out)
    assert [(row[0], row[1], row[-1]) for row in cells] == [
        ("unpruned", "576", "576"), (specs[0], "own", "64"), (specs[1], "own", "82.25"),
        (specs[2], "own", "288"),
    ]  # fmt: skip
    other = ["fopru:max_keep=64", "fopru", "--num-keep", "192", "64"]
    assert main([*words, *other, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]  # once, whatever others are told
    assert [row["num_keep"] for row in rows] == [576, 192, 64, None]
    assert main([*words, "fopru:max_keep=64", "--num-keep", "192", "64"]) == 2
    told = "--num-keep 192 64 would not count: fopru:max_keep=64 says how many tokens stay; leave"
    assert told in capsys.readouterr().err
    assert main([*words, "fastervlm:quality=0.8", "fopru:max_keep=64"]) == 0
    told = "`fastervlm:quality=0.8`: how many tokens 'fastervlm' keeps hangs on"
    assert told in capsys.readouterr().out
    for given in ("fopru", "fastv:stages=[[2,K]]"):
        assert main([*words, "fopru:max_keep=64", given]) == 2
        name = given.partition(":")[0]
        told = f"pruner '{given}' says no budget of its own; pass --num-keep, or"
        assert (
            f"{told} a budget in its settings, e.g. {name}:num_keep=64" in capsys.readouterr().err
        )
    assert main(words[:-1]) == 2
    assert "nothing says how many tokens stay; pass --num-keep" in capsys.readouterr().err


def test_what_cannot_be_counted_is_said(capsys):
    words = ["flops", "--model", "llava-1.5-7b", "--num-keep", "64", "--pruners"]
    assert main([*words, "pyramiddrop", "random"]) == 0
    out = capsys.readouterr().out
    assert [row[0] for row in _cells(out)] == ["unpruned", "random"]
    assert "`pyramiddrop` at K=64: an average of 64 tokens cannot be had" in out
    assert main([*words, "pyramiddrop"]) == 2
    assert "nothing could be counted" in capsys.readouterr().err


def test_a_budget_of_its_own_beyond_the_image_is_refused(capsys):
    words = ["flops", "--model", "llava-1.5-7b", "--pruners", "divprune:num_keep=9999"]
    assert main(words) == 2
    told = "num_keep=9999 exceeds the 576 visual tokens that the image has, so that 'divprune'"
    assert told in capsys.readouterr().err
    assert main([*words, "random:num_keep=576"]) == 0
    out = capsys.readouterr().out
    assert [row[0] for row in _cells(out)] == ["unpruned", "random:num_keep=576"]
    assert told in out


def test_flags_reach_the_count(capsys):
    words = ["flops", "--model", "llava-next-7b", "--num-keep", "576", "--json", "--text-length"]
    more = ["--num-visual", "1152", "--images", "2", "--newlines", "10", "--whole-tower"]
    assert main([*words, "7", *more, "--pruners", "random"]) == 0
    facts = json.loads(capsys.readouterr().out)
    whole, pruned = facts["rows"]
    assert facts["settings"]["text_length"] == 7
    assert (whole["visual"][0], pruned["visual"][0]) == (2 * 1162, 2 * 586)
    assert (whole["num_keep"], pruned["num_keep"]) == (1152, 576)
    assert pruned["tower"] == whole["tower"]


@pytest.mark.parametrize("command", ["flops", "bench"])
def test_results_of_another_command_are_not_written_over(command, tmp_path, capsys):
    words = ["--model", "random:tiny-llava", "--num-keep", "9", "--pruners", "random"]
    for text, told in (('{"kind": "other"}', "is of another command"), ("{", "cannot be read")):
        (tmp_path / "results.json").write_text(text)
        assert main([command, *words, "--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path}/results.json {told}" in error
        assert "another --output" in error
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("model", "num_keep", "message"),
    [
        ("llava-1.5-7b", "577", "--num-keep 577; pass 1 to the 576"),
        ("llava-1.5-7b", "0", "--num-keep 0"),
        ("no/such/model", "64", "no/such/model"),
        ("random:llava-70b", "64", "random:llava-1.5-7b"),
    ],
)
def test_refusals(model, num_keep, message, capsys):
    assert main(["flops", "--model", model, "--num-keep", num_keep]) == 2
    assert message in capsys.readouterr().err


def _cells(text: str) -> list[list[str]]:
    """The rows of the table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
