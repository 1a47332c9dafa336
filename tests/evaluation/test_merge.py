"""`ocvtp merge`: rows of two runs beside each other, as if one had asked them all."""

from __future__ import annotations

import copy
import json

import pytest
from made_up_report import report, row

from ocvtp.cli import main
from ocvtp.evaluation.merge import merge
from ocvtp.evaluation.report import results
from ocvtp.reporting.folder_lock import claimed
from ocvtp.reporting.results_files import read_results

SETTINGS = {
    "task": {"name": "scenes", "images": ["/a/val2017"], "num_images": 20},
    "batch_size": 32,
    "seeds": [0],
    "checkpoints": [],
    "model_weights": "c0ffee",
    "command": "ocvtp evaluate --one",
}
ITEMS = [{"key": f"easy/{n}", "question": "Is it?", "answers": ["yes"]} for n in range(20)]
WHOLE = {"unpruned": 18, "shuffled": 7}
PRUNED = {"random": 9, "fopru": 12, "mine": 14, "scope": 11}


def rows(*labels, **changed):
    rights = {**WHOLE, **PRUNED, **changed}
    found = []
    for label in labels:
        for budget in (1.0,) if label in WHOLE else (0.5, 0.25):
            right = rights[label] - (budget < 0.5)
            found.append(row(label, budget, right, yours=label == "mine"))
    return found


def evaluated(*labels, changed=None, settings=None, environment=None, **given):
    """What results.json holds of a run."""
    made = report(
        *rows("unpruned", "shuffled", *labels, **(changed or {})),
        settings=SETTINGS | (settings or {}),
        environment={"device": "cpu", "torch": "2.9"} | (environment or {}),
        **given,
    )
    keys = {
        f"{r.label} @ {r.num_keep} # 0" if r.budget < 1 else f"{r.label} # 0" for r in made.rows
    }
    answers = {"items": ITEMS, "conditions": {key: [key] * 20 for key in keys}}
    return copy.deepcopy(results(made)) | {"answers": answers}


A, B = ("random", "fopru"), ("mine", "scope")


def by_key(found):
    return {(r["label"], r["budget"]): r for r in found["rows"]}


def test_all_is_as_if_one_run_had_asked_it():
    found, answers = merge(evaluated(*A), evaluated(*B), ("a.json", "b.json"), command="again")
    whole = evaluated(*A, *B)
    assert by_key(found) == by_key(whole)
    assert found["rows"][-1]["figures"]["easy/all"]["minus_random"] is not None
    assert found["warnings"] == whole["warnings"]
    assert found["scores"]["rows"] == [
        dict(zip(by_key(whole), whole["scores"]["rows"], strict=True))[key] for key in by_key(found)
    ]
    assert answers["items"] == ITEMS
    assert answers["conditions"].keys() == whole["answers"]["conditions"].keys()
    assert found["remarks"] == ["from b.json: `mine` at 50%, 25%; `scope` at 50%, 25%."]
    assert found["settings"]["command"] == "again"
    assert found["settings"]["earlier_commands"] == ["ocvtp evaluate --one"]


def test_what_differs_is_named():
    b = evaluated(
        *B,
        settings={
            "batch_size": 8,
            "seeds": [0, 1],
            "task": {**SETTINGS["task"], "images": ["/b/val2017"]},
        },
        environment={"device": "cuda: H200"},
        model="/elsewhere/demo",
    )  # fmt: skip
    found, _ = merge(evaluated(*A), b, ("a", "b"))
    for text in (
        "model: demo in a, /elsewhere/demo in b; its weights are the same.",
        "images of the task: ['/a/val2017'] in a, ['/b/val2017'] in b.",
        "batch_size: 32 in a, 8 in b.",
        "device: cpu in a, cuda: H200 in b.",
        "seeds of what is random: [0] in a, [0, 1] in b.",
    ):
        assert text in found["remarks"], text
    assert found["environment"] == {"device": "cpu; cuda: H200", "torch": "2.9"}
    assert found["settings"]["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"task": "pope"}, "task is 'scenes' in a and 'pope' in b"),
        ({"settings": {"model_weights": "cafe"}}, "the model's weights is 'c0ffee' in a and"),
        (
            {"settings": {"task": {**SETTINGS["task"], "num_images": 9}}},
            "the task's num_images is 20 in a and 9 in b",
        ),
        (
            {"settings": {"task": {**SETTINGS["task"], "images": ["/a/train2017"]}}},
            "the task's images is ['/a/val2017'] in a and ['/a/train2017'] in b",
        ),
    ],
)  # fmt: skip
def test_other_tasks_and_models_are_refused(given, told):
    with pytest.raises(ValueError, match="cannot be compared") as error:
        merge(evaluated(*A), evaluated(*B, **given), ("a", "b"))
    assert told in str(error.value)


def test_other_questions_are_refused():
    b = evaluated(*B)
    b["answers"]["items"] = [*ITEMS[:3], ITEMS[3] | {"question": "Why?"}, *ITEMS[4:]]
    with pytest.raises(ValueError, match="are of other questions .*first differ at easy/3"):
        merge(evaluated(*A), b)


def test_without_weights_the_names_must_do():
    a, b = evaluated(*A), evaluated(*B)
    del b["settings"]["model_weights"]
    found, _ = merge(a, b, ("a", "b"))
    assert any("not known: b does not say" in text for text in found["remarks"])
    with pytest.raises(ValueError, match="model is 'demo' in the first and 'other' in the second"):
        merge(a, b | {"model": "other"})


def test_rows_that_differ_are_refused_unless_one_is_preferred():
    a, b = evaluated(*A), evaluated("fopru", "mine", changed={"fopru": 15})
    with pytest.raises(ValueError, match="these rows differ in a and b: `fopru` at 50%, 25%; pass"):
        merge(a, b, ("a", "b"))
    for prefer, right in (("first", 12), ("second", 15)):
        found, _ = merge(a, b, ("a", "b"), prefer)
        assert by_key(found)["fopru", 0.5]["figures"]["easy/all"]["value"] == right / 20
        assert "mine" in {r["label"] for r in found["rows"]}
        name = {"first": "a", "second": "b"}[prefer]
        assert f"rows that differ, taken from {name}: `fopru` at 50%, 25%." in found["remarks"]


def test_what_one_could_not_run_the_other_fills():
    a, b = evaluated(*A), evaluated("mine")
    for one in a["rows"]:
        if one["label"] == "fopru":
            one |= {"figures": {}, "note": "needs blocks."}
    a["scores"]["rows"] = [
        {} if not one["figures"] else scores
        for one, scores in zip(a["rows"], a["scores"]["rows"], strict=True)
    ]
    found, _ = merge(a, evaluated("fopru", "mine"))
    assert by_key(found)["fopru", 0.5]["figures"]
    found, _ = merge(a, b)
    assert by_key(found)["fopru", 0.5]["note"] == "needs blocks."


def without_scores(found):
    return {name: value for name, value in found.items() if name != "scores"}


def test_figures_without_scores_are_taken_over():
    a, b = without_scores(evaluated(*A)), evaluated("random", "mine")
    found, _ = merge(a, b, ("a", "b"))
    assert by_key(found) == by_key(evaluated("random", "fopru", "mine"))
    assert "scores" not in found
    assert any(text.startswith("a holds no scores of items") for text in found["remarks"])
    found, _ = merge(a, evaluated("random", "mine", changed={"random": 3}), ("a", "b"), "first")
    mine = by_key(found)["mine", 0.5]["figures"]["easy/all"]
    assert mine["minus_random"] is None
    assert mine["minus_unpruned"] is not None
    assert any("differences to rows that were not taken: `mine`" in t for t in found["remarks"])


def store(found, folder):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(found))
    return str(folder)


@pytest.mark.slow
def test_the_command_writes_a_report(capsys, tmp_path):
    a, b = store(evaluated(*A), tmp_path / "a"), store(evaluated(*B), tmp_path / "b")
    words = ["merge", a, f"{b}/results.json", "--output", str(tmp_path / "both")]
    with claimed(tmp_path / "both", "ocvtp evaluate"):
        assert main(words) == 2
    assert "is being written to" in capsys.readouterr().err
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "`mine` (yours)" in out
    again = read_results(tmp_path / "both" / "results.json")
    assert {r["label"] for r in again["rows"]} == {*WHOLE, *PRUNED}
    assert "from " in (tmp_path / "both" / "report.md").read_text()
    assert main([*words[:-1], a]) == 2
    assert "holds one of the two" in capsys.readouterr().err
    assert main(words) == 0  # once more
    before = store(evaluated(*A), tmp_path / "mine")
    assert main([*words[:-1], before]) == 2
    assert f"--output {before} holds another evaluation" in capsys.readouterr().err
