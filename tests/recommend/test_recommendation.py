"""From the command line to one pruner at one budget, on a tiny model and on the demo VLM."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_options import FOUND, option
from PIL import Image

from ocvtp.bench.run import Plan
from ocvtp.cli import main
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.vqa import VqaTask
from ocvtp.hosts.loading import load_model
from ocvtp.recommend.choice import choose, facts_of, front
from ocvtp.recommend.plot import UP, pareto
from ocvtp.recommend.report import markdown, short, write
from ocvtp.recommend.run import Wanted, _chosen, _left_out
from ocvtp.recommend.typical import typical
from ocvtp.reporting.plot_style import marks

DEMO = str(Path(__file__).parents[2] / "checkpoints" / "demo-vlm")


def listed(folder, *questions):
    """A file of questions without answers, each on an image of its own, and the images' folder."""
    entries = [{"image": f"{n}.png", "question": text} for n, text in enumerate(questions)]
    (folder / "list.json").write_text(json.dumps(entries))
    for number, entry in enumerate(entries):
        size = 30 + 10 * number, 20
        Image.new("RGB", size, (60 * number, 0, 90)).save(folder / entry["image"])
    return folder / "list.json"


def made_up(found=FOUND, max_drop=1.0):
    chosen = choose(found, max_drop)
    return {
        "model": "M",
        "task": "scenes",
        "metric": "all",
        "max_drop": max_drop,
        "n": 300,
        "images": 60,
        "unpruned": {"value": 0.7, "low": 0.6, "high": 0.8},
        "sentence": "SENTENCE",
        "doubts": ["DOUBT"],
        "remarks": ["REMARK"],
        "python": [] if chosen is None else ["import ocvtp", "PRUNER", "HANDLE"],
        "rows": facts_of(found, front(found), chosen),
        "left_out": {"hiprune": "needs blocks."},
        "request": {"batch_size": 1, "text_length": 20, "image_size": [96, 96], "tokens": 144},
        "command": "ocvtp recommend ...",
        "environment": {"device": "cpu", "threads": 1, "dtype": "float32"},
    }


def test_words_of_others_do_nothing_in_the_report():
    words = "<img src=x> [a](https://b.example)\n# Mine"
    shown = "&lt;img src=x&gt; [a]\\(https://b.example) # Mine"
    found = made_up() | dict.fromkeys(("model", "task", "sentence", "metric", "command"), words)
    found |= {"doubts": [words], "remarks": [words], "left_out": {words: words}}
    text = markdown(found)
    assert text.count(shown) == 8
    assert "\n# Mine" not in text
    assert f"    {words[:10]}" in text  # code is shown as it is


def test_the_report_says_it_first_and_then_shows_all(tmp_path):
    paths = write(made_up(), tmp_path)
    assert [path.name for path in paths] == [
        "recommendation.json",
        "recommendation.md",
        "pareto.png",
    ]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(made_up()))
    text = paths[1].read_text()
    order = ["**SENTENCE**", "> DOUBT", "    import ocvtp", "## All that was", "hiprune", "REMARK"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    (chosen,) = [line for line in text.splitlines() if "**chosen**" in line]
    cells = [cell.strip() for cell in chosen.strip("|").split("|")]
    assert cells[:6] == ["`fopru`", "96", "-0.8", "-1.9 to +0.3", "57", "56 to 58"]
    assert text.count("| yes") + text.count(" yes |") >= 3
    assert "`uniform` (control)" in text
    assert "PRUNER" in short(made_up())
    assert "## To use it" not in markdown(made_up(max_drop=0.3))


def test_the_plot_shows_every_row_and_tells_the_far_ones_apart():
    found = [*FOUND, option("fopru", 4, -45.0, 35), option("tome", 4, -60.0, 38)]
    (panel,) = pareto(made_up(found)).axes
    names = [text.get_text() for text in panel.get_legend().get_texts()]
    assert set(names) >= {*(row.label for row in FOUND), "unpruned", "Pareto front", "chosen"}
    low, high = panel.get_ylim()
    assert high < 20  # 45 points lost do not press the others together
    dots = np.concatenate([line.get_xydata() for line in panel.lines])
    for row in FOUND:
        near = np.abs(dots - [row.ttft.value, -row.points.value]).sum(axis=1).min()
        assert near < 1e-6, row
    arrows = [
        line for line in panel.lines if line.get_marker() == UP and len(line.get_xdata()) == 1
    ]
    assert {float(line.get_xdata()[0]) for line in arrows} >= {35.0, 38.0}
    annotated = {text.get_text() for text in panel.texts}
    assert {"fopru 96", "fopru 32", "tome 96"} <= annotated
    (front,) = [line for line in panel.lines if line.get_drawstyle() == "steps-post"]
    marks = [
        line for line in panel.lines
        if any(np.allclose(line.get_xydata(), [dot]) for dot in front.get_xydata())
        and line.get_mfc() != "none"
    ]  # fmt: skip
    assert len(marks) >= len(front.get_xydata())
    covers = [front.get_zorder(), *(text.get_zorder() for text in panel.texts)]
    assert min(line.get_zorder() for line in marks) > max(covers)  # nothing hides them


def test_the_plot_draws_labels_as_those_of_accuracy_and_time_do():
    order = {"methods": ["todre", "scope", "fopru", "tome", "divprune"], "controls": ["uniform"]}
    known = marks(**order)
    for found, expected in (
        (made_up() | {"order": order}, known),
        (made_up(), marks(["fopru", "divprune", "tome", "todre"], ["uniform"])),
    ):
        (panel,) = pareto(found).axes
        drawn = {one.get_label(): one for one in panel.get_legend().legend_handles}
        for label in {row.label for row in FOUND}:
            look = drawn[label].get_color(), drawn[label].get_marker()
            assert look == (expected[label].colour, expected[label].marker)


@pytest.mark.slow
def test_one_row_and_rows_without_intervals_are_drawn(tmp_path):
    for found in (FOUND[:1], [option("fopru", 4, -45.0, 135)]):
        rows = made_up(found)
        for row in rows["rows"]:
            row["points"] |= {"low": None, "high": None}
        assert write(rows, tmp_path)[-1].stat().st_size > 0


def test_the_request_is_the_tasks_own(tmp_path):
    task = VqaTask(listed(tmp_path, "What?", "What is in it?", "And what is behind all of that?"))
    subject = Subject(*load_model("random:tiny-llava", "float32"), "random:tiny-llava")
    usual = typical(subject, task)
    assert usual.image_size == task.image(1).size
    assert usual.num_tokens == 144
    inputs = subject.inputs(task, [task.items[1]], [1])
    assert usual.text_length == inputs.first["input_ids"].shape[1] - 144
    assert usual.counts((), (0.5, 0.25)) == [72, 36]
    assert usual.counts((9, 9), (0.0625, 1e-9)) == [9, 1]
    assert usual.cell(4).batch_size == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-drop", "-1"), "--max-drop -1"),
        (("--num-keep", "0"), "--num-keep 0"),
        (("--keep-ratio", "1.5"), "--keep-ratio 1.5"),
        (("--seeds", "0"), "--seeds 0"),
        (("--pruners", "fopro"), "fopru"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(capsys, more, message):
    words = ["recommend", "--model", "no-such-model", "--task", "scenes", *more]
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_adds_the_pruner_that_reads_it(monkeypatch):
    monkeypatch.setattr("ocvtp.pruners.trainable.readers", lambda path: ["surprise"])
    assert Wanted(checkpoint="x").specs[0] == "surprise"
    assert Wanted(checkpoint="x", pruners=["fopru"]).specs == ["fopru"]


def test_counts_are_plain_numbers():
    """Also from Python, where they may come from anywhere; they go into JSON."""
    counts = [np.int64(64), torch.tensor(32)]
    for plan in (Wanted(num_keep=counts), Plan(["fopru"], counts, [])):
        assert [(type(count), count) for count in plan.num_keep] == [(int, 64), (int, 32)]
    for make in (Wanted, lambda num_keep: Plan(["fopru"], num_keep, [])):
        with pytest.raises(ValueError, match="num_keep=0; pass at least 1 token"):
            make(num_keep=[0])


@pytest.mark.slow
def test_questions_without_answers_are_enough_and_a_second_run_goes_on(
    tmp_path, capsys, monkeypatch
):
    file = listed(tmp_path, *(f"What is it, {n}?" for n in range(4)))
    words = ["recommend", "--model", "random:tiny-llava", "--dtype", "float32", "--task", "vqa"]
    words += [
        "--questions-file",
        str(file),
        "--num-keep",
        "72",
        "9",
        "--repetitions",
        "5",
        "--warmup",
        "0",
    ]
    words += ["--output", str(tmp_path / "out"), "--seeds", "1", "--max-drop", "100", "--json"]
    assert main([*words, "--pruners", "fopru"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == "all/agreement"
    assert {(row["label"], row["num_keep"]) for row in found["rows"]} == {
        ("fopru", 72), ("fopru", 9),
    }  # fmt: skip
    assert "agreement with the unpruned model" in found["remarks"][0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"recommendation.json", "recommendation.md", "pareto.png", "accuracy", "speed"} == names
    assert found["request"]["image_size"]
    assert found["order"] == {"methods": ["fopru"], "controls": ["random", "pool"]}
    asked = []
    monkeypatch.setattr("ocvtp.evaluation.runner._ask", lambda *given: asked.append(given))
    monkeypatch.setattr("ocvtp.bench.measure.Bench.rounds", lambda *given: asked.append(given))
    assert main([*words, "--pruners", "fopru"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert not asked
    assert again["rows"] == found["rows"]
    assert main([*words, "--pruners", "fopru", "--metric", "nope"]) == 2
    assert "--metric nope: the figures of this task are all/agreement;" in capsys.readouterr().err
    monkeypatch.undo()
    other = [word for word in words if word != "9"]
    assert main([*other, "--pruners", "uniform"]) == 0  # others there are kept, and not chosen
    found = json.loads(capsys.readouterr().out)
    assert {(row["label"], row["num_keep"]) for row in found["rows"]} == {("uniform", 72)}
    kept = json.loads((tmp_path / "out/accuracy/results.json").read_text())["rows"]
    assert {row["num_keep"] for row in kept if row["label"] == "fopru"} == {72, 9}


@pytest.mark.slow
def test_its_figures_are_those_of_evaluate_and_bench_run_apart(tmp_path, capsys):
    model = ["--model", DEMO, "--dtype", "float32"]
    task = ["--task", "scenes", "--num-images", "4", "--questions", "4"]
    rows = ["--pruners", "fopru", "tome", "--num-keep", "36"]
    often = ["--repetitions", "9", "--warmup", "1"]
    words = ["recommend", *model, *task, *rows, *often, "--seeds", "1", "--json"]
    assert main([*words, "--max-drop", "100", "--output", str(tmp_path / "both")]) == 0
    found = json.loads(capsys.readouterr().out)
    alone = ["evaluate", *model, *task, *rows, "--seeds", "1", "--no-controls", "--json"]
    assert main([*alone, "--output", str(tmp_path / "accuracy")]) == 0
    answered = json.loads(capsys.readouterr().out)
    request = found["request"]
    sizes = ["--text-length", str(request["text_length"]), "--new-tokens", "2"]
    sizes += ["--image-size", *map(str, request["image_size"])]
    alone = ["bench", *model, *rows, *often, *sizes, "--json"]
    assert main([*alone, "--output", str(tmp_path / "speed")]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    for row in found["rows"]:
        key = row["label"], row["num_keep"]
        figures = next(r["figures"] for r in answered["rows"] if (r["label"], r["num_keep"]) == key)
        assert row["points"]["value"] == pytest.approx(
            100 * figures["all"]["minus_unpruned"]["value"]
        )
        time = next(r["figures"]["ttft"]["ratio"] for r in cell["rows"] if r["label"] == key[0])
        assert row["ttft"]["value"] == pytest.approx(100 * time["value"], rel=0.5)


@pytest.mark.parametrize(
    "words", [["--repetitions", "4"], ["--warmup", "-1"], ["--max-drop", "-1"]], ids=str
)
def test_what_bench_would_refuse_is_refused_before_a_model_is_loaded(
    words, tmp_path, monkeypatch, capsys
):
    loaded = "ocvtp.commands.recommend.load_model"
    monkeypatch.setattr(loaded, lambda *_: pytest.fail("it was loaded"))
    start = ["recommend", "--model", "random:tiny-llava", "--task", "scenes"]
    assert main([*start, *words, "--output", str(tmp_path)]) == 2
    assert f"{words[0]} {words[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        (
            "recommend",
            ["--metric", "acuracy"],
            "--metric acuracy: the figures of this task are all",
        ),
        ("recommend", ["--questions-file", "none.json"], "none.json"),
        ("evaluate", ["--num-keep", "9", "--questions-file", "none.json"], "none.json"),
    ],
)
def test_a_task_is_wrong_before_a_model_is_loaded(
    command, words, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(f"ocvtp.commands.{command}.load_model", lambda *_: pytest.fail("loaded"))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    entry = {"question_id": 1, "image": "a.png", "question": "What?", "answers": ["this"]}
    (tmp_path / "q.json").write_text(json.dumps([entry]))
    task = ["--task", "vqa", "--questions-file", str(tmp_path / "q.json"), "--images"]
    start = [command, "--model", "random:tiny-llava", *task, str(tmp_path), "--pruners", "fps"]
    assert main([*start, *words, "--output", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err


def test_what_makes_all_figures_doubtful_is_said_first():
    figure = {"n": 300, "images": 60, "value": 0.7, "low": 0.6, "high": 0.8}
    warnings = [{"level": level, "text": level} for level in ("mild", "loud")]
    rows = [{"label": "unpruned", "figures": {"all": figure}}]
    accuracy = {"rows": rows, "warnings": warnings, "counts": "questions"}
    found = _chosen(accuracy, FOUND, "all", Wanted(), None)
    assert found["doubts"][0] == "loud"
    assert found["doubts"][1].endswith("not excluded by these 300 questions on 60 images.")
    assert "mild" not in found["doubts"]
    assert found["python"][1] == "pruner = ocvtp.build_pruner('fopru', num_keep=96)"


def test_what_is_left_out_is_said_once_with_its_budgets():
    def row(label, num_keep, note="", control=False, figures=()):
        facts = {"label": label, "num_keep": num_keep, "note": note, "control": control}
        return {**facts, "figures": dict.fromkeys(figures)}

    rows = [row("hiprune", count, "no block 8") for count in (72, 36)]
    rows += [
        row("tome", 8, "too few"),
        row("vprune", None, "no pixels"),
        row("oracle", 8, "x", True),
    ]
    rows += [row("fopru", 8, "of a note", figures=["all"])]
    cell = {"unfit": {"tome K=8": "too few", "fopru K=8": "out of memory"}}
    cell["unfit"]["todre K=8"] = "of an earlier run"
    asked = {f"{label} K={count}" for label in ("hiprune", "tome", "fopru") for count in (72, 8)}
    assert _left_out({"rows": rows}, cell, asked) == {
        "hiprune at K=72, 36": "no block 8",
        "tome at K=8": "too few",
        "vprune": "no pixels",
        "fopru K=8": "out of memory",
    }
