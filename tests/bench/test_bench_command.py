"""`ocvtp bench` and `ocvtp compare`, as they are called."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from ocvtp import cli
from ocvtp.bench.compare import compare
from ocvtp.bench.measure import Bench
from ocvtp.bench.report import times_table
from ocvtp.bench.run import Plan
from ocvtp.bench.run import bench as measured
from ocvtp.bench.workload import Cell
from ocvtp.evaluation.runner import Subject
from ocvtp.hosts.loading import load_model
from ocvtp.pruners.methods.fopru import FoPru

FLAGS = ("--model", "random:tiny-llava", "--threads", "1", "--image-size", "96", "96",
         "--text-length", "32", "--new-tokens", "3", "--warmup", "1")  # fmt: skip


def bench(folder, *more, repetitions=5):
    words = ["bench", *FLAGS, "--repetitions", str(repetitions), "--output", str(folder), *more]
    return cli.main(words)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    words = ("--pruners", "fopru", "random", "--num-keep", "16", "64", "--batch-size", "1", "2")
    assert bench(folder, *words) == 0
    return folder


def load(folder):
    return json.loads((folder / "results.json").read_text())


def changed(results, **facts):
    return json.loads(json.dumps(results)) | facts


@pytest.mark.slow
def test_everything_is_on_record(made):
    found = load(made)
    assert (found["kind"], found["schema"]) == ("ocvtp bench", 1)
    assert found["settings"]["attention"]["tower"] == "sdpa"
    assert found["settings"]["attention"]["language_model"] == "sdpa"
    assert {"device", "threads", "dtype", "torch", "ocvtp"} <= set(found["environment"])
    assert [cell["batch_size"] for cell in found["cells"]] == [1, 2]
    for cell in found["cells"]:
        keys = [row["key"] for row in cell["rows"]]
        assert keys == ["unpruned", "fopru K=16", "fopru K=64", "random K=16", "random K=64"]
        for row in cell["rows"]:
            assert all(len(values) == 5 for values in row["samples"].values())
            ttft = row["figures"]["ttft"]
            assert ttft["low"] <= ttft["median"] <= ttft["high"]
            assert ttft["p10"] <= ttft["median"] <= ttft["p90"]
            assert 0.9 < row["accounted"] <= 1
            tokens = row["throughput"]["tokens_per_second"]
            request = row["figures"]["request"]["median"]
            assert tokens == pytest.approx(3e3 * cell["batch_size"] / request, rel=1e-4)
            parts = row["samples"]
            first = sum(parts[name][0] for name in ("tower", "select", "project", "prefill"))
            assert first + parts["decode"][0] <= parts["whole"][0]
        shares = [row["operations_left"]["ttft"] for row in cell["rows"]]
        assert shares[0] == 1
        assert shares[1] < shares[2] < 1
    kept = [row["kept"]["visual_tokens_kept"] for row in found["cells"][1]["rows"][1:]]
    assert kept == [[16, 16], [64, 64]] * 2


def test_the_report_has_true_averages(made):
    cell = load(made)["cells"][0]
    kept = cell["rows"][1]["kept"]
    assert kept["visual_tokens_average"] == [16]
    assert "average" not in times_table(cell)
    kept["layers"] = [{"layer": 2, "visual_tokens_kept": [4]}]
    kept["visual_tokens_average"] = [8]
    assert "| 16, 4 from layer 2, 8 on average" in times_table(cell)
    del kept["visual_tokens_average"]  # of an earlier version
    assert "| 16, 4 from layer 2 " in times_table(cell)


def test_the_report_says_what_was_measured(made):
    text = (made / "report.md").read_text()
    for words in ("Batch 2, 144 image tokens, 32 text tokens", "fopru K=16", "95% intervals",
                  "sdpa in the tower", "flash_attention_for_cpu", "KV, prompt"):  # fmt: skip
        assert words in text
    for name in ("ttft.png", "stages.png"):
        assert min(Image.open(made / name).size) > 300


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(made, capsys):
    before = load(made)["cells"]
    (made / "cells" / "batch2-text32-images1.json").unlink()
    words = ("--pruners", "fopru", "random", "--num-keep", "16", "64", "--batch-size", "1", "2")
    assert bench(made, *words, "--json") == 0
    after = json.loads(capsys.readouterr().out)["cells"]
    assert after[0] == before[0]
    assert after[1]["rows"][0]["samples"] != before[1]["rows"][0]["samples"]


@pytest.mark.parametrize("size", ["1", "4"])
def test_cells_of_other_settings_are_refused(made, capsys, size):
    """Also those that are not asked for: one report is of one way to time."""
    words = ("--pruners", "fopru", "--num-keep", "16", "--batch-size", size, "--image-size", "48")
    before = (made / "results.json").read_bytes()
    assert bench(made, *words, "48") == 2
    error = capsys.readouterr().err
    assert "was timed under other settings (--image-size); pass another --output" in error
    assert (made / "results.json").read_bytes() == before


def keys_of(found):
    return [[row["key"] for row in cell["rows"]] for cell in found["cells"]]


@pytest.mark.slow
def test_a_narrower_run_keeps_rows_and_cells(made, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "same"
    shutil.copytree(made, folder)
    before = load(folder)
    monkeypatch.setattr(Bench, "rounds", lambda *_: pytest.fail("timed again"))
    assert bench(folder, "--pruners", "random", "--num-keep", "16", "--batch-size", "2") == 0
    printed = capsys.readouterr().out
    after = load(folder)
    assert sorted(keys_of(after)) == sorted(keys_of(before))
    assert [cell["batch_size"] for cell in after["cells"]] == [2, 1]
    assert after["cells"][1] == before["cells"][0]
    (remark,) = after["remarks"]
    assert "fopru K=16, fopru K=64, random K=64 of cell batch2-text32-images1" in remark
    assert "cell batch1-text32-images1" in remark
    assert remark in printed
    assert f"> Note. {remark}" in (folder / "report.md").read_text()
    assert after["settings"]["pruners"] == ["fopru", "random"]
    assert after["earlier_commands"]
    assert all("--pruners fopru random" in one for one in after["earlier_commands"])


@pytest.mark.slow
def test_what_is_asked_joins_what_is_there(made, tmp_path, capsys):
    folder = tmp_path / "same"
    shutil.copytree(made, folder)
    before = load(folder)
    wide = ("--pruners", "uniform", "fopru", "--num-keep", "16", "9", "--batch-size", "1")
    for _ in range(2):  # the second finds all of it
        assert bench(folder, *wide) == 0
    found = load(folder)
    cell, other = found["cells"]
    assert other == before["cells"][1]
    assert cell["rows"][:5] == before["cells"][0]["rows"]
    later = cell["rows"][5:]
    assert [row["key"] for row in later] == ["uniform K=16", "uniform K=9", "fopru K=9"]
    for row in later:
        own = np.median(np.divide(row["samples"]["tower"], row["beside"]["samples"]["tower"]))
        assert row["figures"]["tower"]["ratio"]["value"] == pytest.approx(own, rel=0.2)
        assert row["beside"]["samples"] != cell["rows"][0]["samples"]
    assert "uniform K=9: of a later run, beside an unpruned TTFT" in (
        (folder / "report.md").read_text()
    )
    names = sorted(path.name for path in (folder / "cells").iterdir())
    assert names == ["batch1-text32-images1.2.json", "batch1-text32-images1.json",
                     "batch2-text32-images1.json"]  # fmt: skip
    path = str(folder / "results.json")
    assert cli.main(["compare", path, path, "--fail-on-regression"]) == 0
    slow = slowed(found, "uniform K=9", 1.5)
    changes = compare(found, slow)["changes"]
    ratios = {(c["row"], c["metric"]): c["relative"] for c in changes}
    assert ratios["uniform K=9", "ttft"]["value"] == pytest.approx(1.5, rel=0.01)
    assert ratios["fopru K=9", "ttft"]["value"] == pytest.approx(1)


def test_a_cell_that_cannot_be_read_is_named(made, tmp_path, capsys):
    folder = tmp_path / "same"
    shutil.copytree(made, folder)
    path = folder / "cells" / "batch2-text32-images1.json"
    for text in ("{", "[]", '{"header": {}}'):
        path.write_text(text)
        assert bench(folder, "--pruners", "fopru", "--num-keep", "16") == 2
        (line,) = (x for x in capsys.readouterr().err.splitlines() if "error" in x)
        assert line.startswith(f"ocvtp: error: {path} ")
        assert "delete that file, or another --output" in line


@pytest.mark.slow
def test_accuracy_is_drawn_against_time(made, tmp_path, capsys):
    rows = [
        {"label": label, "num_keep": keep, "figures": {"accuracy": {"value": value}}}
        for label, keep, value in (("unpruned", None, 0.9), ("fopru", 16, 0.7), ("fopru", 64, 0.8))
    ]
    facts = {"task": "scenes", "metrics": ["accuracy"], "rows": rows}
    path = tmp_path / "accuracy.json"
    path.write_text(json.dumps(facts))
    words = ("--pruners", "fopru", "random", "--num-keep", "16", "64", "--batch-size", "1", "2")
    before = (made / "ttft.png").read_bytes()
    assert bench(made, *words, "--accuracy", str(path)) == 0
    assert (made / "ttft.png").read_bytes() != before
    path.write_text(json.dumps({**facts, "rows": []}))
    capsys.readouterr()
    for folder in (made, tmp_path / "new"):
        assert bench(folder, *words, "--accuracy", str(path)) == 2
        assert "of no pruner and budget that was timed" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()  # before anything is timed
    for broken in ("", "{", "[]", json.dumps({**facts, "rows": [{}]})):
        path.write_text(broken)
        assert bench(made, *words, "--accuracy", str(path)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ocvtp: error: --accuracy {path} ")


def test_what_cannot_run_is_refused_before_it_is_timed(tmp_path, capsys):
    words = ("--pruners", "fastv", "fopru", "--num-keep", "16")
    assert bench(tmp_path / "a", *words) == 2
    error = capsys.readouterr().err
    assert "fastv K=16: an average of 16 tokens cannot be had" in error
    assert "--skip-unfit" in error
    assert bench(tmp_path / "b", "--pruners", "fopru", "--num-keep", "16", "1000") == 2
    assert "fopru K=1000: --num-keep 1000 exceeds the" in capsys.readouterr().err
    for flags, message in (
        (("--repetitions", "2"), "--repetitions 2; pass at least 5"),
        (("--new-tokens", "1"), "--new-tokens 1; pass at least 2"),
        (("--batch-size", "0"), "--batch-size 0; pass at least 1"),
    ):
        assert bench(tmp_path / "b", *words, *flags) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_run_is_left_out_if_one_says_so(tmp_path):
    words = ("--pruners", "fastv", "fopru", "--num-keep", "16", "--skip-unfit")
    assert bench(tmp_path, *words) == 0
    assert "- fastv K=16 could not be run: an average" in (tmp_path / "report.md").read_text()


def test_equal_files_do_not_differ(made, capsys):
    path = str(made / "results.json")
    assert cli.main(["compare", path, path, "--fail-on-regression"]) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out


def slowed(results, row, factor):
    found = changed(results)
    for cell in found["cells"]:
        for one in cell["rows"]:
            if row in (one["key"], None):
                samples = one["samples"]
                for part in samples:
                    samples[part] = [factor * value for value in samples[part]]
    return found


@pytest.fixture
def steady(made):
    """The same results, hardly any noise."""
    found = load(made)
    for cell in found["cells"]:
        for row in cell["rows"]:
            samples = row["samples"]
            for part, values in samples.items():
                samples[part] = [values[0] * (1 + 0.002 * (i % 5)) for i in range(20)]
    return found


def test_ten_percent_are_found(steady, tmp_path, capsys):
    found = compare(steady, slowed(steady, "fopru K=16", 1.1))
    flagged = {(c["row"], c["metric"], c["flag"]) for c in found["changes"] if c["flag"]}
    assert flagged == {("fopru K=16", m, "slower") for m in ("ttft", "tpot", "request")}
    ratio = next(c for c in found["changes"] if c["row"] == "fopru K=16")["plain"]
    assert ratio["low"] < 1.1 < ratio["high"] or ratio["value"] == pytest.approx(1.1)
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, results in zip(paths, (steady, slowed(steady, "fopru K=16", 1.1)), strict=True):
        path.write_text(json.dumps(results))
    words = ["compare", *map(str, paths)]
    assert cli.main(words) == 0
    assert cli.main([*words, "--fail-on-regression"]) == 1
    assert cli.main(["compare", *map(str, reversed(paths)), "--fail-on-regression"]) == 0
    assert "6 faster" in capsys.readouterr().out


def test_a_slower_machine_is_the_bare_models_alone(steady):
    found = compare(steady, slowed(steady, None, 1.2))
    assert {c["row"] for c in found["changes"] if c["flag"]} == {"unpruned"}


def test_small_changes_are_not_flagged(steady):
    assert compare(steady, slowed(steady, "fopru K=16", 1.02))["slower"] == 0
    assert compare(steady, slowed(steady, "fopru K=16", 1.02), tolerance=0.01)["slower"] == 6


def test_files_that_cannot_be_compared(steady, tmp_path, capsys):
    other = changed(steady)
    other["cells"][0]["rows"] = other["cells"][0]["rows"][:-1]
    with pytest.raises(ValueError, match=r"b lacks Batch 1, .*: random K=64. Time both"):
        compare(steady, other)
    with pytest.raises(ValueError, match="new_tokens is 3 in a and 4 in b"):
        compare(steady, changed(steady, settings={**steady["settings"], "new_tokens": 4}))
    path = tmp_path / "other.json"
    for results, message in (
        (changed(steady, schema=0), "has schema 0, this version reads 1"),
        ({"task": "pope"}, "is no result of `ocvtp bench`"),
    ):
        path.write_text(json.dumps(results))
        assert cli.main(["compare", str(path), str(path)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "absent.json"), str(path)]) == 2


def without(found, *path):
    found = changed(found)
    place = found
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return found


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (("schema",), "schema is missing"),
        (("cells",), "cells is missing"),
        (("settings", "new_tokens"), "settings.new_tokens is missing"),
        (("environment", "torch"), "environment.torch is missing"),
        (("cells", 0, "block"), "cells[0].block is missing"),
        (("cells", 1, "rows", 2, "samples"), "cells[1].rows[2].samples is missing"),
        (("cells", 0, "rows", 0, "samples", "tower"), "samples.tower is missing"),
        (("cells", 0, "rows", 3, "samples", "tower", 0), "rounds of 'random K=16' are missing"),
    ],
)
def test_results_that_are_not_whole_are_named(made, tmp_path, capsys, path, problem):
    (tmp_path / "a.json").write_text(json.dumps(without(load(made), *path)))
    assert cli.main(["compare", str(made / "results.json"), str(tmp_path / "a.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ocvtp: error: {tmp_path / 'a.json'} is not whole: ")
    assert problem in line


def test_another_device_is_a_warning(steady):
    environment = {**steady["environment"], "device": "cuda: H200"}
    found = compare(steady, changed(steady, environment=environment))
    assert found["warnings"] == [
        f"device: {steady['environment']['device']} in a, cuda: H200 in b."
    ]


@pytest.mark.slow
def test_two_runs_agree_and_a_planted_slowdown_is_found(tmp_path, monkeypatch):
    """On a machine that may be busy: three attempts."""
    name, choose = "random:tiny-llava", FoPru._select
    subject = Subject(*load_model(name, "float32"), name)
    sizes = {"new_tokens": 2, "warmup": 1, "repetitions": 100, "image_size": (96, 96)}
    plan = Plan(["fopru"], [16], [Cell(1, 32)], **sizes)
    for attempt in range(3):
        a, b = (measured(subject, plan, tmp_path / f"{name}{attempt}") for name in "ab")
        row = next(r for r in a["cells"][0]["rows"] if r["label"] == "fopru")
        seconds = 0.15 * row["figures"]["ttft"]["median"] / 1e3

        def slow(self, tokens, num_keep, seconds=seconds):
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass
            return choose(self, tokens, num_keep)

        monkeypatch.setattr(FoPru, "_select", slow)
        c = measured(subject, plan, tmp_path / f"c{attempt}")
        monkeypatch.setattr(FoPru, "_select", choose)
        same = [x for x in compare(a, b)["changes"] if x["flag"] and x["relative"]]
        planted = [
            (x["row"], x["metric"]) for x in compare(a, c)["changes"] if x["flag"] == "slower"
        ]
        if not same and ("fopru K=16", "ttft") in planted:
            return
    pytest.fail(f"same: {same}; planted: {planted}")
