"""Questions without right answers: how often a pruned model says what the whole one says."""

import json

import numpy as np
import pytest
from listed_files import answers, write_images

from ocvtp.evaluation.conditions import Budget
from ocvtp.evaluation.lmms.export import export_task
from ocvtp.evaluation.report import results
from ocvtp.evaluation.run import evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.agreement import Agreement
from ocvtp.evaluation.tasks.base import TokenTask
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.evaluation.tasks.vqa import VqaTask
from ocvtp.hosts.loading import load_model

ENTRIES = [
    {"image": "a.png", "question": "What colour?", "kind": "colour"},
    {"image": "a.png", "question": "How many?", "kind": "count"},
    {"image": "b.png", "question": "How many dogs?", "kind": "count"},
]


@pytest.fixture
def write(tmp_path):
    folder = write_images(tmp_path / "images", ["a.png", "b.png"])

    def written(entries):
        (tmp_path / "list.json").write_text(json.dumps(entries))
        return VqaTask(tmp_path / "list.json", folder)

    return written


def test_agreement_is_of_answers_in_their_normal_form(write):
    task = write(ENTRIES)
    assert task.metrics == ("all/agreement",)
    said, whole = answers(["Red.", "3", "one"]), answers(["red", "three", "two"])
    figures = task.compared(said, whole)
    values = {name: ratio.value for name, ratio in figures.items()}
    expected = {"all/agreement": 2 / 3, "colour/agreement": 1, "count/agreement": 0.5}
    assert values == pytest.approx(expected)
    assert figures["count/agreement"].owners.tolist() == [0, 1]
    with pytest.raises(ValueError, match="no right answers"):
        task.ratios(said)


def test_answers_to_some_questions_alone_are_refused(write):
    with pytest.raises(ValueError, match=r"entry 2 of .* lacks 'answers'.* 1 of 3 .*agreement"):
        write([{**ENTRIES[0], "answer": "red"}, *ENTRIES[1:]])
    task = write([{**entry, "answer": "red"} for entry in ENTRIES])
    assert task.metrics == ("all/accuracy",)
    said = answers(["red", "red", "2"])
    assert task.compared(said, said)["all/accuracy"].value == pytest.approx(2 / 3)


def test_lmms_eval_is_not_given_questions_without_answers(write, tmp_path):
    with pytest.raises(ValueError, match="without right answers"):
        export_task(write(ENTRIES), tmp_path / "out")


def test_any_task_of_questions_can_be_judged_so(tmp_path):
    model = load_model("random:tiny-llava", "float32")
    asked = SceneTask(levels=("easy",), num_images=2, questions=2, size=48)
    task = Agreement(asked)
    assert task.describe() == asked.describe()
    subject = Subject(*model, "random:tiny-llava")

    def ask(*pruners):
        options = {"controls": (), "batch_size": 4}
        return evaluate(subject, task, pruners, [Budget(num_keep=4)], tmp_path, **options)

    report, records = ask("fopru")
    found = results(report)
    rows = {row["label"]: row["figures"]["all/agreement"] for row in found["rows"]}
    assert rows["unpruned"]["value"] == 1
    said, whole = ([r["answer"] for r in records[k]] for k in ("fopru @ 4 # 0", "unpruned # 0"))
    assert said != whole
    same = np.mean([a == b for a, b in zip(said, whole, strict=True)])
    assert rows["fopru"]["value"] == pytest.approx(same)
    assert rows["fopru"]["minus_unpruned"]["value"] == pytest.approx(same - 1)
    assert "agreement with the unpruned model" in found["remarks"][0]
    (tmp_path / "results.json").write_text(json.dumps(found))
    again, _ = ask("uniform")  # the row of the earlier run is made again from its answers
    kept = next(row for row in again.rows if row.label == "fopru")
    assert kept.figures["all/agreement"].value == pytest.approx(same)


def test_a_task_that_asks_nothing_has_nothing_to_agree_on():
    class Looks(TokenTask):
        name, items, metrics = "looks", (), ("cosine",)
        image = ratios = describe = look = None

    with pytest.raises(ValueError, match="cosine"):
        Agreement(Looks())
