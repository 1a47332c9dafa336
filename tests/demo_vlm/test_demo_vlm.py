"""`ocvtp demo-vlm`: the stages learn, a stopped training continues, the folder is a model."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_demo_vlm import generator, tiny_batch, tiny_learner, tiny_settings, write_config

from ocvtp.cli import main
from ocvtp.data.scenes import draw_scene
from tools.demo_vlm import training
from tools.demo_vlm.card import card, control_table, figure_table
from tools.demo_vlm.settings import load_settings
from tools.demo_vlm.training import _step, build_optimizer, rate, train


@pytest.fixture(scope="module", autouse=True)
def few_to_validate_on():
    """To draw hundreds of scenes after a stage of three steps takes longer than the stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_VAL_SCENES", 16)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command, once, on stages of three steps."""
    folder = tmp_path_factory.mktemp("demo")
    config = write_config(tiny_settings("nowhere"), folder / "tiny.yaml")
    output = folder / "model"
    assert main(["demo-vlm", "--config", str(config), "--output", str(output)]) == 0
    return config, output


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", range(5))
@pytest.mark.sampled(1)
def test_each_stage_lowers_its_loss(number, tmp_path):
    """On four scenes again and again, in 25 steps."""
    settings = tiny_settings(tmp_path, steps=25)
    stage = settings.stages[number]
    learner = tiny_learner()
    batch = tiny_batch(stage, 4)
    learner.begin(stage, batch, generator())
    optimizer = build_optimizer(learner, stage)
    losses = []
    for step in range(25):
        terms = _step(learner, settings, stage, optimizer, step, batch, generator(step))
        losses.append({name: float(term.detach()) for name, term in terms.items()})
    assert set(losses[0]) == {n for n in ("dense", "align", "answer") if getattr(stage, n)}
    for name in losses[0]:
        first, last = (np.mean([row[name] for row in rows]) for rows in (losses[:3], losses[-3:]))
        assert last < 0.95 * first, f"{name}: {first} -> {last}"


def weights(learner):
    return {name: value.clone() for name, value in learner.state_dict().items()}


class KilledError(Exception):
    """In place of the signal that ends a process."""


def killed_after(settings, steps, monkeypatch, resume=False):
    """Train, and stop in the step with this number, counted over all stages."""
    calls = []

    def step_or_die(*arguments):
        if len(calls) == steps:
            raise KilledError
        calls.append(1)
        return _step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", step_or_die)
        with pytest.raises(KilledError):
            train(settings, resume)


@pytest.mark.slow
def test_a_killed_training_continues_to_the_same_weights(tmp_path, monkeypatch):
    """Killed twice: inside a stage between two checkpoints, and in the first step of another."""
    whole = weights(train(tiny_settings(tmp_path / "whole", steps=3)))
    settings = tiny_settings(tmp_path / "killed", steps=3)
    killed_after(settings, 8, monkeypatch)  # step 3 of `read`, whose last checkpoint is step 2
    folder = tmp_path / "killed/training"
    assert {p.stem for p in folder.glob("*.ckpt")} == {"1-tower", "2-align", "3-read"}
    state = torch.load(folder / "3-read.ckpt", weights_only=True)
    assert state["step"] == 2
    killed_after(settings, 1, monkeypatch, resume=True)  # the first step of `drop`
    found = weights(train(settings, resume=True))
    assert whole.keys() == found.keys()
    different = [name for name in whole if not torch.equal(whole[name], found[name])]
    assert not different
    for name in ("3-read", "5-english"):
        rows = [
            list(csv.DictReader((tmp_path / run / f"training/{name}.csv").open()))
            for run in ("whole", "killed")
        ]
        assert rows[0] == rows[1]
        assert [row["step"] for row in rows[0]] == ["3"]


@pytest.mark.slow
def test_training_is_seeded(tmp_path):
    first, again, other = (
        weights(train(replace(tiny_settings(tmp_path / str(number), steps=1), seed=seed)))
        for number, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.slow
def test_a_training_is_not_overwritten_or_mixed(tmp_path):
    settings = tiny_settings(tmp_path, steps=1)
    train(settings)
    with pytest.raises(ValueError, match="--resume"):
        train(settings)
    later = replace(settings.stages[-1], steps=2)
    changed = replace(settings, stages=[*settings.stages[:-1], later])
    with pytest.raises(ValueError, match="other settings"):
        train(changed, resume=True)
    with pytest.raises(ValueError, match="other settings"):
        train(replace(settings, seed=3), resume=True)
    train(settings, resume=True)


@pytest.mark.slow
def test_stages_may_be_added(tmp_path):
    settings = tiny_settings(tmp_path, steps=1)
    train(replace(settings, stages=settings.stages[:2]))
    learner = train(settings, resume=True)
    expected = train(replace(settings, output=str(tmp_path / "whole")))
    assert all(torch.equal(a, b) for a, b in zip(*map(_values, (learner, expected)), strict=True))


def _values(learner):
    return list(learner.state_dict().values())


def test_rates_rise_stay_and_fall():
    stage = replace(tiny_settings("x").stages[0], steps=100, warmup=10, hold=0.5)
    rates = [rate(stage, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[9:50]) == {1.0}
    assert rates[75] == pytest.approx(0.51)
    assert 0.02 <= rates[99] < 0.03


@pytest.mark.slow
def test_the_folder_is_a_model(run):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, folder = run
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert len(names) > 40
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert model.generation_config.max_new_tokens == 4


@pytest.mark.slow
def test_the_folder_holds_what_was_trained(run):
    from transformers import AutoModelForImageTextToText

    config, folder = run
    learner = train(replace(load_settings(config), output=str(folder)), resume=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    pairs = zip(model.named_parameters(), learner.model.parameters(), strict=True)
    for (name, saved), trained in pairs:
        torch.testing.assert_close(saved, trained, atol=2e-3, rtol=2e-3, msg=name)
    batch = tiny_batch(replace(learner_stage(), prompts="english"), 3)
    features, _ = learner.encode(batch.pixel_values)
    with torch.no_grad():
        found = model.model.get_image_features(pixel_values=batch.pixel_values)
        expected = learner.project(features)
    found = getattr(found, "pooler_output", found)
    torch.testing.assert_close(torch.stack(list(found)), expected, atol=0.02, rtol=0.02)


def learner_stage():
    return tiny_settings("x").stages[2]


@pytest.mark.slow
def test_answer_command_prunes_the_model(run, tmp_path, capsys):
    _, folder = run
    Image.fromarray(draw_scene(0, 0, 48).image).save(tmp_path / "scene.png")
    words = ["answer", "--model", str(folder), "--pruner", "fastervlm", "--num-keep", "5"]
    words += ["--image", str(tmp_path / "scene.png"), "--prompt", "What colour is the small star?"]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["visual_tokens"], facts["visual_tokens_kept"]) == ([36], [5])


@pytest.mark.slow
def test_the_card_says_what_was_measured(run):
    config, folder = run
    text = (folder / "README.md").read_text()
    facts = json.loads((folder / "figures.json").read_text())
    assert facts["metrics"] == ["easy/all", "hard/all"]
    assert facts["settings"]["task"]["split"] == "test"
    labels = {(row["label"], row["num_keep"]) for row in facts["rows"]}
    assert labels == {("unpruned", None), ("shuffled", None), ("random", 2), ("oracle", 2)}
    assert figure_table(facts) in text
    assert control_table(facts) in text
    assert all(row["figures"]["easy/all"]["images"] == 4 for row in facts["rows"])
    assert "4 `test` scenes" in text
    assert str(config) in text
    assert "| drop | 3 x 4 | align + answer, tower frozen |" in text
    assert "**Token dropping.** In drop, english," in text
    assert "$" not in text


@pytest.mark.slow
def test_a_model_without_dropping_is_not_for_pruning(run, tmp_path):
    facts = json.loads((run[1] / "figures.json").read_text())
    settings = tiny_settings(tmp_path)
    plain = replace(settings, stages=settings.stages[:3])
    assert "do not compare pruners" in card(plain, "x.yaml", facts, 10)


@pytest.mark.slow
def test_json_is_one_object_and_finished_trainings_are_measured_again(run, capsys):
    config, folder = run
    before = (folder / "model.safetensors").read_bytes()
    words = ["demo-vlm", "--config", str(config), "--output", str(folder)]
    assert main([*words, "--resume", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["output"] == str(folder)
    found = json.loads((folder / "figures.json").read_text())
    assert facts["figures"]["rows"] == found["rows"]
    assert (folder / "model.safetensors").read_bytes() == before
    assert main(words) == 2
    assert "--resume" in capsys.readouterr().err
