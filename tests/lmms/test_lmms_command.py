"""lmms-eval's own command on local tasks, offline: the answers of `ocvtp evaluate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ocvtp.cli import main

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; `make test-lmms` has it")

DEMO = str(Path(__file__).parents[2] / "checkpoints" / "demo-vlm")
BATCH = ("--batch-size", "4")
SCENES = ("--levels", "easy", "hard", "--num-images", "3", "--questions", "5")


def lmms_eval(folder, output, tasks, model_args, *more):
    """A run of its own; (process, results, samples by task)."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "ocvtp", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={DEMO},dtype=float32,device=cpu,{model_args}"]
    command += ["--include_path", str(folder), "--tasks", ",".join(tasks)]
    command += ["--output_path", str(output), "--log_samples", *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = [json.loads(path.read_text()) for path in output.rglob("*_results.json")]
    samples = {
        task: [
            json.loads(line)
            for path in output.rglob(f"*_samples_{task}.jsonl")
            for line in path.read_text().splitlines()
        ]
        for task in tasks
    }
    return done, found[0] if found else None, samples


def evaluate(folder, pruner, task, *more):
    """Answers and figures of `ocvtp evaluate` under one pruner."""
    words = ["evaluate", "--model", DEMO, "--dtype", "float32", "--task", task, *more, *BATCH]
    words += ["--pruners", pruner, "--num-keep", "16", "--seeds", "1", "--no-controls"]
    assert main([*words, "--output", str(folder)]) == 0
    facts = json.loads((folder / "results.json").read_text())
    (figures,) = (row["figures"] for row in facts["rows"] if row["label"] == pruner)
    (answers,) = (
        some for key, some in facts["answers"]["conditions"].items() if key.startswith(pruner)
    )
    return answers, {name: figure["value"] for name, figure in figures.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks: scenes; their questions as a VQA list; those of yes and no as POPE's."""
    root = tmp_path_factory.mktemp("lmms")
    words = ["lmms-task", "--model", DEMO, "--task", "scenes", *SCENES]
    assert main([*words, "--output", str(root / "scenes")]) == 0
    rows = [json.loads(line) for line in (root / "scenes" / "questions.jsonl").open()]
    rows = [row | {"image": Path(row["image"]).name} for row in rows]
    (root / "list.json").write_text(json.dumps(rows))
    pope = [
        {"question_id": n, "image": r["image"], "text": r["question"], "label": r["answers"][0]}
        for n, r in enumerate(rows)
        if r["answers"][0] in ("yes", "no")
    ]
    (root / "pope_popular.json").write_text("".join(json.dumps(line) + "\n" for line in pope))
    for task in ("vqa", "pope"):
        words = ["lmms-task", "--task", task, *files(root, task)]
        assert main([*words, "--output", str(root / task)]) == 0
    return root


@pytest.fixture(autouse=True)
def offline(folder, monkeypatch):
    """Of the commands that a test runs."""
    monkeypatch.setenv("HF_HOME", str(folder / "huggingface"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


def files(root, task):
    name = {"vqa": "list.json", "pope": "pope_popular.json"}[task]
    return ("--questions-file", str(root / name), "--images", str(root / "scenes" / "images"))


@pytest.mark.slow
def test_its_answers_and_figures_are_those_of_evaluate(folder, tmp_path):
    tasks = [f"ocvtp_{name}_local" for name in ("scenes", "vqa", "pope")]
    done, results, samples = lmms_eval(
        folder, tmp_path / "out", tasks, "pruner=divprune,num_keep=16"
    )
    assert done.returncode == 0, done.stderr
    for task, more in (
        ("scenes", SCENES),
        ("vqa", files(folder, "vqa")),
        ("pope", files(folder, "pope")),
    ):
        name = f"ocvtp_{task}_local"
        answers, figures = evaluate(tmp_path / task, "divprune", task, *more)
        assert [sample["filtered_resps"] for sample in samples[name]] == answers
        found = {k.removesuffix(",none"): v for k, v in results["results"][name].items()}
        pairs = {
            "scenes": {"easy": "easy/all", "hard": "hard/all", "accuracy": "all"},
            "vqa": {"accuracy": "all/accuracy", "exact": "all/exact"},
            "pope": {"accuracy": "all/accuracy", "f1": "all/f1", "popular": "popular/accuracy"},
        }[task]
        assert {ours: found[ours] for ours in pairs} == pytest.approx(
            {ours: figures[theirs] for ours, theirs in pairs.items()}
        )
    scenes = results["results"]["ocvtp_scenes_local"]
    assert scenes["easy,none"] > 0.7  # the demo VLM sees
    counts = [count for some in samples.values() for s in some for count in s["token_counts"]]
    assert {(count["visual_tokens"], count["visual_tokens_kept"]) for count in counts} == {
        (144, 16)
    }
    assert "kept 16.00 of 144.00 visual tokens per request" in done.stdout
    assert "batch size 4" in done.stdout
    assert results["throughput"]["avg_visual_tokens_kept"] == 16


@pytest.mark.slow
def test_what_is_random_draws_as_in_evaluate(folder, tmp_path):
    """It depends on the number of a batch's first question."""
    task = "ocvtp_scenes_local"
    tasks = ["ocvtp_pope_local", task]  # those that run beside it must not matter
    done, _, samples = lmms_eval(folder, tmp_path / "out", tasks, "pruner=random,num_keep=16")
    assert done.returncode == 0, done.stderr
    answers, _ = evaluate(tmp_path / "evaluate", "random", "scenes", *SCENES)
    assert [sample["filtered_resps"] for sample in samples[task]] == answers


@pytest.mark.slow
def test_a_run_that_fails_has_no_results(folder, tmp_path):
    task = "ocvtp_pope_local"
    args = 'pruner="fopru:strategy=row,block=-2",num_keep=145'
    done, results, samples = lmms_eval(
        folder, tmp_path / "out", [task], args, "--verbosity", "DEBUG"
    )
    assert done.returncode != 0
    assert "num_keep=145 exceeds the 144 visual tokens" in done.stderr
    assert "while pruner 'fopru:strategy=row,block=-2' answered" in done.stderr
    assert results is None
    assert samples == {task: []}
