"""Learned selectors of both stages side by side: each has its checkpoints and its own control."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_networks import selector

from ocvtp.cli import main
from ocvtp.evaluation.checkpoint_groups import grouped
from ocvtp.evaluation.conditions import Budget, pruner_conditions, untrained_conditions

STAGES = {"learned": "llm_input", "learned_layers": "llm_layers"}
DEMO = Path(__file__).parents[2] / "checkpoints" / "demo-vlm"


def exported(folder, name, seed, **config):
    """An artifact for the demo VLM; networks of other seeds have other weights."""
    config |= {"layer": 1} if name == "learned_layers" else {}
    network = selector(STAGES[name], 96, "prompted", 128, training={"seed": seed}, **config)
    network.scorer.kinds.data += seed + 10 * (name == "learned")
    network.save_pretrained(folder / f"{name}-{seed}")
    return str(folder / f"{name}-{seed}")


def test_each_runs_with_its_own_checkpoints(tmp_path):
    paths = [exported(tmp_path, name, seed) for name in STAGES for seed in (0, 1)]
    assert grouped(paths) == ([paths[:2], paths[2:]], "")
    for name, own in zip(STAGES, (paths[:2], paths[2:]), strict=True):
        found = pruner_conditions(name, [Budget(num_keep=64)], [0], paths, 144)
        assert [condition.settings["checkpoint"] for condition in found] == own


def test_those_of_another_choice_are_not_averaged(tmp_path):
    paths = [exported(tmp_path, "learned", seed, choice=c) for seed, c in ((0, "topk"), (1, "mmr"))]
    groups, remark = grouped(paths)
    assert groups == [[path] for path in paths]
    assert "choice: topk and None" in remark
    assert "choice.mmr: None and 0.5" in remark


@pytest.mark.parametrize("name", STAGES)
def test_the_untrained_control_acts_where_the_trained_does(name):
    like = selector(STAGES[name], 8)
    like.scorer.inputs.mean += 2.0
    found = untrained_conditions([Budget(num_keep=9)], [0, 1], like)
    assert [condition.label for condition in found] == [f"untrained:{name}"] * 2
    pruners = [condition.make(None) for condition in found]
    assert all(pruner.name == name for pruner in pruners)
    assert pruners[0].network.scorer.inputs.mean.equal(like.scorer.inputs.mean)
    weights = [pruner.network.scorer.out.weight for pruner in pruners]
    assert not weights[0].equal(weights[1])


@pytest.mark.slow
def test_both_are_evaluated_at_once(tmp_path, capsys):
    paths = [exported(tmp_path, name, 0) for name in STAGES]
    words = ["evaluate", "--model", str(DEMO), "--task", "scenes", "--levels", "easy"]
    words += ["--num-images", "1", "--seeds", "1", "--num-keep", "64", "--json"]
    words += ["--output", str(tmp_path / "out"), "--checkpoint", *paths]
    assert main([*words, "--pruners", *STAGES, "learned:choice={mmr: 0.5}"]) == 0
    rows = {row["label"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for label in (*STAGES, "learned:choice={mmr: 0.5}"):
        assert rows[label]["trained"]
        assert rows[label]["visual_tokens"] == 64
    for name in STAGES:
        assert rows[f"untrained:{name}"]["control"]
        assert rows[f"untrained:{name}"]["visual_tokens"] == 64
