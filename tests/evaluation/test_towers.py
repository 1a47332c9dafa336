"""Pruners keep of a vision tower alone what they keep of it in a VLM; what cannot be is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_llava, tiny_processor
from tiny_timm import tiny_timm

from ocvtp.cli import main
from ocvtp.data.scenes import write_scenes
from ocvtp.encoders.base import FrozenEncoder
from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.evaluation.conditions import Budget
from ocvtp.evaluation.run import evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.coverage import CoverageTask
from ocvtp.evaluation.tasks.kept_tokens import kept_of_tower
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.evaluation.towers import TowerSubject
from ocvtp.hosts.loading import load_model
from ocvtp.pruners.specs import build_spec
from ocvtp.random_models.clip_config import plain_processor
from ocvtp.slots import OCPruner, OCPrunerConfig
from ocvtp.structures import Needs

DEMO = str(Path(__file__).parents[2] / "checkpoints" / "demo-vlm")
BUDGETS = [Budget(num_keep=16), Budget(keep_ratio=0.0625)]
OF_THE_TOWER = ("fastervlm", "visionzip", "fopru", "prumerge", "hiprune", "fps", "ridge")
DINOS_AND_SIGLIP2 = ("tiny-dinov2", "tiny-dinov2-with-registers", "tiny-dinov3", "tiny-siglip2")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Folder and annotations of three scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=1, num_val=3, size=96, seed=0)
    return folder / "val2017", folder / "annotations/instances_val2017.json"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two seeds of an OC-pruner for the demo VLM's tower."""
    paths = []
    for seed in (0, 1):
        config = OCPrunerConfig(
            feature_dim=96, hidden_dim=16, slot_dim=16, ffn_dim=16, layer=2, noise_seed=seed
        )
        path = tmp_path_factory.mktemp(f"seed{seed}")
        OCPruner.untrained(replace(config, grid_hw=(12, 12)), seed).save_pretrained(path)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory):
    """A tiny ViT as timm writes it, for 56 pixels."""
    folder = tmp_path_factory.mktemp("timm") / "tower"
    tiny_timm(folder)
    return f"local-dir:{folder}"


def words(output, tower, drawn, *more, task="coverage"):
    found = ["evaluate", "--tower", tower, "--task", task, "--output", str(output), "--seeds", "1"]
    files = ["--images", str(drawn[0]), "--instances", str(drawn[1])]
    return [*found, *(files if task == "coverage" else []), "--num-keep", "9", *more]


@pytest.mark.slow
def test_figures_are_those_of_the_vlm_with_this_tower(drawn, networks, tmp_path):
    vlm, processor = load_model(DEMO)
    pruners = (*OF_THE_TOWER, "ocvtp", "fastv", "greedyprune")
    options = {"checkpoints": networks, "seeds": [0, 1], "batch_size": 2, "skip_unfit": True}
    model = Subject(vlm, processor, DEMO)
    task = CoverageTask(*drawn, processor)
    whole, asked = evaluate(model, task, pruners, BUDGETS, tmp_path / "vlm", **options)
    tower, alone = TowerSubject(DEMO), CoverageTask(*drawn, None)
    report, found = evaluate(tower, alone, pruners, BUDGETS, tmp_path / "tower", **options)
    unfit = {"fastv", "greedyprune"}
    assert set(found) == {key for key in asked if key.split(" ")[0] not in unfit}
    assert {"ocvtp", "untrained", "random", "uniform", "pool", "fill_only", "oracle"} <= {
        key.split(" ")[0] for key in found
    }
    for key, records in found.items():
        assert len(records) == 3
        for record, own in zip(records, asked[key], strict=True):
            assert record.keys() == own.keys()
            for name, value in record.items():
                assert value == pytest.approx(own[name], abs=1e-5), (key, name)
    rows = {(row.label, row.num_keep): row for row in report.rows}
    assert rows["ocvtp", 16].seeds == 2
    assert rows["fastervlm", 16].visual_tokens == 16
    assert "reads the prompt, which a tower alone has not" in rows["greedyprune", 16].note
    assert rows["fastervlm", 16].note == ""
    assert "'fastv' acts at stage 'llm_layers'" in rows["fastv", 16].note
    assert report.metrics == whole.metrics
    assert report.settings["feature_layer"] == 4


@pytest.mark.parametrize("tower", ["tiny", "tiny-dinov3"])
def test_projected_tokens_are_those_of_the_tower(drawn, tower, tmp_path):
    subject, task = TowerSubject(f"random:{tower}"), CoverageTask(*drawn, None)
    specs = ["divprune", "todre", "fps:space=projected", "fps"]
    run = {"batch_size": 3, "controls": ("random",), "seeds": [0]}
    report, found = evaluate(subject, task, specs, [Budget(num_keep=9)], tmp_path, **run)
    pictures = subject.pictures([task.image(owner) for owner in range(3)])
    needs = Needs(hidden=(subject.encoder.layer,), attention=((-1, "cls"),))
    seen = CLIPEncoder(f"random:{tower}", layer=subject.encoder.layer).load(needs)(pictures)
    seen = replace(seen, projected=seen.features)
    for spec in specs:
        pruner = build_spec(spec, num_keep=9)
        judged = kept_of_tower(seen, pruner.select(seen), (96, 96), subject.sight)
        own = task.judge(judged, task.items)
        for record, expected in zip(found[f"{spec} @ 9 # 0"], own, strict=True):
            assert {name: record[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    said = "the tower's own, as there is no projector"
    notes = {row.label: row.note for row in report.rows}
    assert notes == dict.fromkeys(["unpruned", "random", "fps"], "") | dict.fromkeys(
        specs[:3], f"projected tokens: {said}"
    )
    assert all(row.figures for row in report.rows)
    assert report.settings["projected_tokens"] == said


@pytest.mark.parametrize("tower", DINOS_AND_SIGLIP2)
@pytest.mark.slow
def test_towers_of_transformers(drawn, tower, tmp_path, capsys):
    more = ["--pruners", "fastervlm", "visionzip", "fopru", "divprune", "--skip-unfit", "--json"]
    assert main(words(tmp_path, f"random:{tower}", drawn, "--no-controls", *more)) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["label"]: row for row in facts["rows"]}
    assert rows["unpruned"]["visual_tokens"] == 144  # registers are none of them
    assert (facts["settings"]["grid"], facts["settings"]["feature_layer"]) == ([12, 12], 5)
    reads_cls = {"fastervlm", "visionzip"}
    for name, row in rows.items():
        if tower == "tiny-siglip2" and name in reads_cls:
            assert "reads the CLS token" in row["note"]
        elif name != "unpruned":
            assert row["visual_tokens"] == 9
            assert 0 < row["figures"]["cosine"]["value"] < 1
    asked = words(tmp_path / "large", f"random:{tower}", drawn, "--no-controls", "--json")
    asked += ["--pruners", "fopru", "--img-size", "112"]
    if tower == "tiny-siglip2":
        assert main(asked) == 2
        assert "--img-size 112, but the tower 'random:tiny-siglip2' sees" in capsys.readouterr().err
        return
    assert main(asked) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["settings"]["grid"] == [14, 14]
    assert {row["label"]: row["visual_tokens"] for row in facts["rows"]}["unpruned"] == 196


@pytest.mark.slow
def test_it_runs_once_for_all_pruners_that_agree(drawn, tower_folder, tmp_path, monkeypatch):
    shapes, plain = [], FrozenEncoder.forward

    def counted(self, pixels, *more):
        shapes.append(tuple(pixels.shape))
        return plain(self, pixels, *more)

    monkeypatch.setattr(FrozenEncoder, "forward", counted)
    subject, task = TowerSubject(tower_folder, img_size=84), CoverageTask(*drawn, None)
    run = {"batch_size": 2, "controls": ("random", "uniform", "oracle"), "seeds": [0]}
    _, records = evaluate(subject, task, ["fastervlm", "visionzip"], BUDGETS, tmp_path, **run)
    assert shapes == [(2, 3, 84, 84)] * 2 + [(1, 3, 84, 84)]  # tried, and two batches
    shapes.clear()
    again = evaluate(subject, task, ["fastervlm", "visionzip"], BUDGETS, tmp_path, **run)[1]
    assert again == records
    assert shapes == [(2, 3, 84, 84)]  # tried; nothing is encoded for figures
    shapes.clear()
    evaluate(subject, task, ["fopru", "fill_only"], BUDGETS, tmp_path / "two", **run)
    assert len(shapes) == 2 * 3  # received attention of two meanings
    with pytest.raises(ValueError, match="holds answers .* under other settings"):
        evaluate(TowerSubject(tower_folder), task, ["fastervlm"], BUDGETS[:1], tmp_path, **run)


@pytest.mark.slow
def test_any_size_from_the_command_line(drawn, tower_folder, tmp_path, capsys):
    more = ["--img-size", "84", "--pruners", "fastervlm", "fopru", "--json"]
    assert main(words(tmp_path, tower_folder, drawn, *more)) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["label"]: row for row in facts["rows"]}
    assert {"unpruned", "random", "uniform", "pool", "fill_only", "untrained", "oracle"} < set(rows)
    assert rows["unpruned"]["visual_tokens"] == 36
    assert rows["unpruned"]["figures"]["coverage/all"]["value"] == 1
    assert rows["fastervlm"]["figures"]["coverage/all"]["minus_random"]["low"] is not None
    settings = facts["settings"]
    assert (settings["grid"], settings["feature_layer"]) == ([6, 6], 2)
    assert facts["model"] == tower_folder
    assert (tmp_path / "report.md").read_text().count("fastervlm")
    more = ["--img-size", "84", "--pruners", "visionzip", "--json", "--feature-layer", "1"]
    assert main(words(tmp_path, tower_folder, drawn, *more)) == 2
    assert "has rows whose an" in capsys.readouterr().err


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--img-size", "60"), "--img-size 60 is no multiple of the 14 pixels"),
        (("--feature-layer", "7"), "hidden_states[7] does not exist in this tower"),
        (("--text-tower", "random:tiny"), "--text-tower is for pruners that read the prompt"),
        (("--dtype", "float8"), "--dtype float8; pass auto"),
        (("--device", "nowhere"), "--device nowhere cannot be used"),
        (("--pruners", "fastv:stages=[[1,4]]"), "acts at stage 'llm_layers'"),
        (("--pruners", "tome"), "acts at stage 'encoder'"),
        (("--pruners", "trim"), "reads the prompt, which a tower alone has not; pass a VLM"),
        (("--pruners", "cdpruner"), "reads the prompt, which a tower alone has not; pass a VLM"),
        (("--pruners", "fastervlm:block=9"), "blocks[9] does not exist in this tower"),
        (
            ("--pruners", "uniform", "--num-keep", "17"),
            "--num-keep 17 exceeds the 16 visual tokens",
        ),
    ],
)
def test_what_does_not_fit_is_told(drawn, tower_folder, tmp_path, capsys, more, message):
    assert main(words(tmp_path, tower_folder, drawn, *more)) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("ocvtp: error:") == 1


def test_flags_that_exclude_each_other(drawn, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(words(tmp_path, "random:tiny", drawn, "--model", "random:tiny-llava"))
    assert "not allowed with argument" in capsys.readouterr().err
    for more in (("--img-size", "96"), ("--feature-layer", "-1")):
        asked = words(tmp_path, "random:tiny", drawn, *more)
        asked[1:3] = ["--model", "random:tiny-llava"]
        assert main(asked) == 2
        told = capsys.readouterr().err
        assert f"{' '.join(more)} is of a vision tower alone" in told
    assert main(words(tmp_path, "random:tiny", drawn, task="scenes")) == 2
    told = capsys.readouterr().err
    assert "--task scenes asks a language model, which a tower alone has not; pass a VLM" in told
    task = SceneTask(num_images=1, questions=1, size=48)
    with pytest.raises(ValueError, match="--task scenes asks a language model"):
        evaluate(TowerSubject("random:tiny"), task, [], BUDGETS, tmp_path)


@pytest.mark.slow
def test_a_tower_without_a_cls(drawn, tmp_path, capsys):
    folder, how = tmp_path / "tower", {"class_token": False, "global_pool": "avg"}
    tiny_timm(folder, "vit_small_patch16_224", img_size=64, **how)
    asked = words(tmp_path / "out", str(folder), drawn, "--pruners", "fastervlm", "fopru", "--json")
    assert main(asked) == 2
    assert "reads the CLS token, which the tower timm:local-dir:" in capsys.readouterr().err
    assert main([*asked, "--skip-unfit"]) == 0
    rows = {row["label"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert "reads the CLS token" in rows["fastervlm"]["note"]
    assert not rows["fopru"]["note"]


def test_a_tower_without_a_cls_whose_last_layer_is_read(drawn, tmp_path):
    vlm, processor = tiny_llava("siglip", vision_feature_layer=-1), tiny_processor()
    processor.vision_feature_select_strategy = "full"
    processor.num_additional_image_tokens = 0
    vlm.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    name = str(tmp_path)
    run = {"batch_size": 2, "controls": ("random",), "seeds": [0], "skip_unfit": True}
    model, tower = Subject(vlm, processor, name), TowerSubject(name)
    assert tower.encoder.layer == tower.num_tower_blocks
    pruners, budgets = ["fopru", "fps", "fastervlm"], [Budget(num_keep=3)]
    _, asked = evaluate(
        model, CoverageTask(*drawn, processor), pruners, budgets, tmp_path / "vlm", **run
    )
    report, found = evaluate(
        tower, CoverageTask(*drawn, None), pruners, budgets, tmp_path / "tower", **run
    )
    assert found.keys() == asked.keys()
    for key, records in found.items():
        for record, own in zip(records, asked[key], strict=True):
            assert record == pytest.approx(own, abs=1e-5), key
    assert "reads the CLS token" in {row.label: row.note for row in report.rows}["fastervlm"]


def test_pictures_of_other_sizes_and_tiles_are_refused(drawn, tmp_path, capsys):
    vlm, _ = load_model("random:tiny-llava")
    vlm.save_pretrained(tmp_path / "large")
    plain_processor(104).save_pretrained(tmp_path / "large")
    assert main(words(tmp_path / "out", str(tmp_path / "large"), drawn)) == 2
    told = capsys.readouterr().err
    assert "a picture of shape (3, 104, 104), which is not one grid of 12 x 12 patches of 8" in told
    vlm, processor = load_model("random:tiny-llava-next")
    vlm.save_pretrained(tmp_path / "tiles")
    processor.save_pretrained(tmp_path / "tiles")
    assert main(words(tmp_path / "out", str(tmp_path / "tiles"), drawn)) == 2
    assert "which is not one grid of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_later_run_adds_to_an_earlier_one_in_half_precision(
    drawn, tower_folder, tmp_path, capsys
):
    for pruner in ("fastervlm", "fopru"):
        asked = words(tmp_path, tower_folder, drawn, "--pruners", pruner, "--no-controls", "--json")
        assert main([*asked, "--dtype", "bfloat16"]) == 0
        facts = json.loads(capsys.readouterr().out)
    assert {row["label"] for row in facts["rows"]} == {"unpruned", "fastervlm", "fopru"}
    assert facts["environment"]["dtype"] == "bfloat16"
    asked = words(tmp_path, tower_folder, drawn, "--no-controls")
    asked[1:3] = ["--model", "random:tiny-llava"]
    assert main(asked) == 2
    assert "has rows whose an" in capsys.readouterr().err


def test_a_network_of_another_tower(drawn, networks, tower_folder, tmp_path, capsys):
    more = ["--pruners", "ocvtp", "--checkpoint", *networks]
    assert main(words(tmp_path, tower_folder, drawn, *more)) == 2
    told = capsys.readouterr().err
    assert "[B, N, 96], hidden_states[2] of" in told
    assert OCPruner.from_pretrained(networks[0]).config.layer == 2


@pytest.mark.slow
def test_two_folders_in_one_run(drawn, tower_folder, tmp_path, capsys):
    write_scenes(tmp_path / "more", num_train=1, num_val=2, size=96, seed=5)
    other = tmp_path / "more/val2017", tmp_path / "more/annotations/instances_val2017.json"
    pairs = [[str(path) for path in pair] for pair in zip(drawn, other, strict=True)]
    asked = words(tmp_path / "out", tower_folder, drawn, "--no-controls", "--pruners", "uniform")
    start = asked.index("--images")
    asked[start : start + 4] = ["--images", *pairs[0], "--instances", *pairs[1], "--json"]
    assert main(asked) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["label"]: row["figures"] for row in facts["rows"]}
    assert rows["uniform"]["cosine"]["n"] == 5
    assert facts["settings"]["task"]["images"] == pairs[0]
